// Tensor maps (descriptors of the TMA unit) for row-major matrices of 16-bit numbers. Host code.
#pragma once

#include <cuda.h>

#include "../driver.cuh"

namespace mmadapt {

using TensorMapEncode = CUresult (*)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                     const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                     const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                     CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Boxes of `box_columns` x `box_rows` of `count` matrices [rows, columns], one behind another. Rows of a box
// are stored box_columns x 2 bytes apart, which is 128 or 64, with the swizzle of that width. What lies
// outside of a matrix reads as 0 and is not written. The map has three coordinates; with count 0 it is one
// matrix and has two.
inline cudaError_t tiles(CUtensorMap *map, const void *matrices, int64_t count, int64_t rows,
                         int64_t columns, int box_rows, int box_columns) {
  static TensorMapEncode encode = nullptr;
  static const cudaError_t found = driver_function("cuTensorMapEncodeTiled", 12000, &encode);
  if (found != cudaSuccess) return found;
  // The driver wants a context on this thread; the runtime binds one where it is asked for a device.
  int device;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  const cuuint64_t sizes[3] = {cuuint64_t(columns), cuuint64_t(rows), cuuint64_t(count)};
  const cuuint64_t strides[2] = {cuuint64_t(columns) * 2, cuuint64_t(columns) * rows * 2};
  const cuuint32_t box[3] = {cuuint32_t(box_columns), cuuint32_t(box_rows), 1}, steps[3] = {1, 1, 1};
  const CUtensorMapSwizzle swizzle =
      box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  // The type matters to arithmetic only, of which copies have none: bf16 stands for any 16 bits.
  const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, count == 0 ? 2 : 3,
                                 const_cast<void *>(matrices), sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Boxes of 64 columns of one [rows, columns] matrix: a map of two coordinates.
inline cudaError_t row_tiles(CUtensorMap *map, const void *matrix, int64_t rows, int64_t columns,
                             int box_rows) {
  return tiles(map, matrix, 0, rows, columns, box_rows, 64);
}

}  // namespace mmadapt
