// The factored linear layer on Hopper: the GEMM whose K continues over the ranks.
//
//   forward   y  = [x | core] [W | factor_out]^T + bias
//   backward  dx = [dy_1 | .. | dz] [W_1; ..; factor_in]            (W as it is stored: N-major)
//
// y is written once, by one accumulator; the low-rank term costs R more of K. Blocks are persistent; each
// works on tiles of 128 x COLUMNS, two on tiles below one another as a cluster:
//
//      memory/L2                     a block                                            memory
//        |      TMA        +------------------------+
//        +---------------> | x     [128, 64]        |  wgmma   +-----------------+        ^
//        |                 |                        | -------> | 2 warpgroups    |        |
//        |      TMA, half  | W     [COLUMNS, 64]    |          | [64, COLUMNS]   |        |
//        +-------------+-> |                        |          | sums each       |        |
//                      |   |   x stages             |          +-----------------+        |
//                      |   +------------------------+             | + bias, to 16 bit     |
//                      +-> the other block of the cluster,        v                       |
//                          which sends its half here       +---------------+     TMA      |
//                                                          | boxes 16 x 64 | -------------+
//   one thread loads, one warp fetches the bias            +---------------+
//
// A stage is loaded again when the consumer warps of both blocks have released it, since its half of W goes
// to both. While tile n is stored, the stages of tile n + 1 fill. What each role does: cp_linear/gemm_roles.cuh.
//
// K is summed in one order, whatever the tile: reruns are bit-equal.

#include "cp_linear/gemm_roles.cuh"
#include "hopper/multiprocessors.h"
#include "hopper/roles.cuh"
#include "hopper/tensor_map.cuh"
#include "launch.cuh"
#include "resident.cuh"
#include "vec.cuh"

namespace mmadapt::cp_linear {
namespace {

// No block leaves while another may still write into its shared memory.
__device__ __forceinline__ void leave_together() {
  __syncwarp();
  hopper::cluster_arrive();
  hopper::cluster_wait();
}

template <class T, int COLUMNS, Major MAJOR>
__global__ void __launch_bounds__(kThreads, 1) cp_linear_gemm_kernel(const __grid_constant__ Arguments a) {
  using L = Layout<COLUMNS>;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = hopper::local(memory);
  float *bias = reinterpret_cast<float *>(memory + L::kBias);
  const Barriers<COLUMNS> barriers = {shared + L::kBarriers};
  const int warp = hopper::uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) barriers.init(a.cluster);
  __syncwarp();
  hopper::cluster_arrive();
  hopper::cluster_wait();
  const Tiles tiles = my_tiles(a);
  if (warp >= kConsumerWarps) {
    hopper::fewer_registers<40>();
    if (warp == kConsumerWarps) {
      if (lane == 0) load_tiles<COLUMNS, MAJOR>(a, barriers, shared, tiles);
    } else if (warp == kConsumerWarps + 1 && a.bias != nullptr) {
      load_bias<T>(a, barriers, bias, tiles, lane);
    }
    leave_together();
  } else {
    hopper::more_registers<232>();
    const int group = warp / 4;
    const uint32_t left = hopper::gemm::first_box<Major::K>(shared + group * (64 * 128));
    const uint32_t right = hopper::gemm::first_box<MAJOR>(shared + L::kLeftBytes);
    const uint32_t boxes = shared + L::kStores + warp * 2 * kStoreBytes;
    const uint32_t peer = hopper::remote(barriers.empty(0), tiles.rank ^ (a.cluster - 1));
    const Release<COLUMNS> release = {barriers, peer, lane == 0, a.cluster == 2};
    Ring<L::kStages> ring;
    Ring<2> bias_ring;
    for (int index = tiles.index; index < tiles.end; index += tiles.step) {
      const Origin at = origin<COLUMNS>(a, tiles, index);
      float d[COLUMNS / 2];
      multiply_tile<T, COLUMNS, MAJOR>(d, a, barriers, release, left, right, ring);
      const float *tile_bias = nullptr;
      if (a.bias != nullptr) {
        hopper::barrier_wait(barriers.bias_full(bias_ring.slot), bias_ring.parity);
        tile_bias = bias + bias_ring.slot * COLUMNS;
      }
      store_tile<T, COLUMNS>(d, a, tile_bias, boxes, at.row + warp * kStoreRows, at.column, lane);
      if (a.bias != nullptr) {
        hopper::barrier_arrive_if(lane == 0, barriers.bias_empty(bias_ring.slot));
        bias_ring.advance();
      }
    }
    if (lane == 0) hopper::tma_wait_read<0>();
    leave_together();
  }
}

constexpr char kName[] = "cp_linear_gemm_kernel";

// The constraint that fails, or null.
const char *refusal(const mmadapt_cp_linear_gemm_sm90 &p) {
  if (p.dtype != MMADAPT_BF16 && p.dtype != MMADAPT_F16) return "dtype: expected bf16 or fp16";
  if (p.bias_dtype != p.dtype && p.bias_dtype != MMADAPT_F32) return "bias_dtype: expected dtype or fp32";
  if (p.tokens < 1 || p.tokens > INT32_MAX - 2 * kRows) return "tokens: out of range";
  if (p.inner < 8 || p.inner % 8 != 0) return "inner: expected a multiple of 8";
  if (p.columns < 8 || p.columns % 8 != 0) return "columns: expected a multiple of 8";
  if (p.rank < 0 || p.rank % 8 != 0 || p.rank > MMADAPT_CP_LINEAR_MAX_RANK) {
    return "rank: expected a multiple of 8, at most 128";
  }
  if (p.rank > 0 && (p.core_columns < p.rank || p.core_columns % 8 != 0)) {
    return "core_columns: expected a multiple of 8, at least rank";
  }
  if (p.count < 1 || p.count > MMADAPT_CP_LINEAR_MAX_GROUP) return "count: expected 1 to 8";
  if (p.tile != 0 && p.tile != 128 && p.tile != 192 && p.tile != 256) {
    return "tile: expected 0, 128, 192 or 256";
  }
  if (p.cluster < 0 || p.cluster > 2) return "cluster: expected 0, 1 or 2";
  if (p.group < 0) return "group: expected 0 or more";
  for (int k = 0; k < p.count; ++k) {
    if (!aligned16(p.left[k]) || !aligned16(p.right[k])) {
      return "left, right: expected addresses at multiples of 16";
    }
  }
  for (const void *pointer : {p.core, p.factor, static_cast<const void *>(p.y)}) {
    if (!aligned16(pointer)) return "core, factor, y: expected addresses at multiples of 16";
  }
  return nullptr;
}

// Boxes of `right` [columns, K], or transposed [K, columns]: what a block of the cluster loads of it.
cudaError_t right_tiles(CUtensorMap *map, const void *matrix, int columns, int inner, int tile,
                        int cluster, bool transposed) {
  return transposed ? row_tiles(map, matrix, inner, columns, kChunk / cluster)
                    : row_tiles(map, matrix, columns, inner, tile / cluster);
}

cudaError_t fill_maps(Arguments &a, const mmadapt_cp_linear_gemm_sm90 &p, int tile) {
  cudaError_t error = row_tiles(&a.y, p.y, p.tokens, p.columns, kStoreRows);
  for (int k = 0; k < p.count && error == cudaSuccess; ++k) {
    error = row_tiles(&a.segments[k].left, p.left[k], p.tokens, p.inner, kRows);
    if (error != cudaSuccess) break;
    error = right_tiles(&a.segments[k].right, p.right[k], p.columns, p.inner, tile, a.cluster, p.transposed);
  }
  if (error != cudaSuccess || p.rank == 0) return error;
  Segment &last = a.segments[p.count];
  error = row_tiles(&last.left, p.core, p.tokens, p.core_columns, kRows);
  if (error != cudaSuccess) return error;
  return right_tiles(&last.right, p.factor, p.columns, p.rank, tile, a.cluster, p.transposed);
}

template <class T, int COLUMNS, Major MAJOR>
mmadapt_cuda_status launch_tile(Arguments &a, const mmadapt_cp_linear_gemm_sm90 &p) {
  using L = Layout<COLUMNS>;
  mmadapt_cuda_status status = pending_error(kName);
  if (failed(status)) return status;
  const auto kernel = &cp_linear_gemm_kernel<T, COLUMNS, MAJOR>;
  int clusters = 0;
  cudaError_t error = resident_clusters(reinterpret_cast<const void *>(kernel), a.cluster, kThreads,
                                        L::kBytes, L::kBytes, &clusters);
  if (error == cudaSuccess && clusters < 1) error = cudaErrorLaunchOutOfResources;
  if (error == cudaSuccess) error = fill_maps(a, p, COLUMNS);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cuda_status(error, kName);
  }
  a.column_tiles = (p.columns + COLUMNS - 1) / COLUMNS;
  const int64_t tiles = int64_t((a.row_tiles + a.cluster - 1) / a.cluster) * a.column_tiles;
  if (tiles > INT32_MAX - clusters) return bad_argument("tokens and columns: too many tiles");
  if (clusters > tiles) clusters = static_cast<int>(tiles);
  return launch({kName, dim3(clusters * a.cluster), dim3(kThreads), L::kBytes, p.stream,
                 static_cast<unsigned>(a.cluster), /*told=*/true, p.overlap != 0 && p.rank > 0},
                kernel, a);
}

template <class T, Major MAJOR>
mmadapt_cuda_status launch_major(Arguments &a, const mmadapt_cp_linear_gemm_sm90 &p, int tile) {
  if (tile == 128) return launch_tile<T, 128, MAJOR>(a, p);
  if (tile == 192) return launch_tile<T, 192, MAJOR>(a, p);
  return launch_tile<T, 256, MAJOR>(a, p);
}

template <class T>
mmadapt_cuda_status launch_type(Arguments &a, const mmadapt_cp_linear_gemm_sm90 &p, int tile) {
  return p.transposed ? launch_major<T, Major::N>(a, p, tile) : launch_major<T, Major::K>(a, p, tile);
}

}  // namespace
}  // namespace mmadapt::cp_linear

using namespace mmadapt;

extern "C" mmadapt_cuda_status mmadapt_cp_linear_gemm_cuda(const mmadapt_cp_linear_gemm_sm90 *call) {
  using namespace cp_linear;
  const mmadapt_cp_linear_gemm_sm90 &p = *call;
  if (const char *reason = refusal(p)) return bad_argument(reason);
  Arguments a = {};
  a.count = p.count;
  a.chunks = (p.inner + kChunk - 1) / kChunk;
  a.rank_chunks = (p.rank + kChunk - 1) / kChunk;
  const int rest = p.rank % kChunk;
  a.last_steps = rest == 0 ? 4 : (rest + 15) / 16;
  a.row_tiles = static_cast<int>((p.tokens + kRows - 1) / kRows);
  a.cluster = p.cluster != 0 ? p.cluster : a.row_tiles > 1 ? 2 : 1;
  const int group = p.group == 0 ? kDefaultGroup : p.group;
  a.group = (group + a.cluster - 1) / a.cluster;
  a.columns = p.columns;
  a.bias = p.bias;
  a.bias_is_fp32 = p.bias_dtype == MMADAPT_F32;
  const int tile = p.tile != 0 ? p.tile : choose_tile(a.row_tiles, p.columns, hopper::kMultiprocessors);
  return p.dtype == MMADAPT_BF16 ? launch_type<__nv_bfloat16>(a, p, tile) : launch_type<__half>(a, p, tile);
}
