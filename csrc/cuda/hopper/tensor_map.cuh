// Tensor maps (descriptors of the TMA unit) for row-major matrices of 16-bit numbers. Host code.
#pragma once

#include <cuda.h>

#include "../driver.cuh"

namespace mmadapt {

using TensorMapEncode = CUresult (*)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                     const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                     const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                     CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Tiles of `columns` x `rows` of a [total_rows, total_columns] matrix. Rows of a tile are stored 128 bytes
// apart with the 128-byte swizzle, so `columns` is 64. What lies outside reads as 0 and is not written.
inline cudaError_t row_tiles(CUtensorMap *map, const void *matrix, int64_t total_rows,
                             int64_t total_columns, int columns, int rows) {
  static TensorMapEncode encode = nullptr;
  static const cudaError_t found = driver_function("cuTensorMapEncodeTiled", 12000, &encode);
  if (found != cudaSuccess) return found;
  // The driver wants a context on this thread; the runtime binds one where it is asked for a device.
  int device;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  const cuuint64_t sizes[2] = {cuuint64_t(total_columns), cuuint64_t(total_rows)};
  const cuuint64_t strides[1] = {cuuint64_t(total_columns) * 2};
  const cuuint32_t box[2] = {cuuint32_t(columns), cuuint32_t(rows)}, steps[2] = {1, 1};
  // The type matters to arithmetic only, of which copies have none: bf16 stands for any 16 bits.
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void *>(matrix), sizes, strides, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The same with `columns` 64 or 32: rows of a tile are 2 * columns bytes long, and swizzled as wide.
inline cudaError_t swizzled_tiles(CUtensorMap *map, const void *matrix, int64_t total_rows,
                                  int64_t total_columns, int columns, int rows) {
  if (columns == 64) return row_tiles(map, matrix, total_rows, total_columns, columns, rows);
  static TensorMapEncode encode = nullptr;
  static const cudaError_t found = driver_function("cuTensorMapEncodeTiled", 12000, &encode);
  if (found != cudaSuccess) return found;
  int device;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  const cuuint64_t sizes[2] = {cuuint64_t(total_columns), cuuint64_t(total_rows)};
  const cuuint64_t strides[1] = {cuuint64_t(total_columns) * 2};
  const cuuint32_t box[2] = {cuuint32_t(columns), cuuint32_t(rows)}, steps[2] = {1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void *>(matrix), sizes, strides, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace mmadapt
