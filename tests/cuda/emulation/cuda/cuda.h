// The part of the driver's interface that makes tensor maps.
#pragma once

#include <cstdint>

using CUresult = int;
constexpr CUresult CUDA_SUCCESS = 0;
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

// Matrices [sizes[2], sizes[1], sizes[0]] of 16-bit numbers, and a box of them.
struct CUtensorMap {
  uint16_t *base;
  int64_t sizes[3];
  int dimensions, box_rows, box_columns;
};

CUresult encode_tensor_map(CUtensorMap *map, CUtensorMapDataType, cuuint32_t dimensions, void *base,
                           const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                           const cuuint32_t *steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                           CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
