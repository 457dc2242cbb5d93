// SwiGLU adapter on Hopper: forward, and the gradient of x.
//
//   forward   z = rstd (x [gate; down]^T), h = silu(z_gate) z_down, y = base + scale (h up^T)
//   backward  dh = scale (dy up), dz from dh and the saved z, dx = base's + dz [gate; down]
//
// Both are two skinny products around a few operations on the rank, so one kernel does both. x (or dy)
// is read from memory once and y (or dx) written once. A cluster of C blocks owns 32 rows at a time;
// each block keeps a slice of d, its weights resident in shared memory for the whole launch:
//
//      memory          block 0 .. C-1 of a cluster, each with d/C columns            memory
//        |                                                                             ^
//        | TMA    +-----------+ wgmma  +----------+ st.async  +-------------------+    |
//        +------> | x tile    | -----> | D1 parts | --------> | owner: sum over C |    | TMA
//                 | [32, d/C] | [W1]   | [2m, 32] |  cluster  | activation        |    |
//                 |           |        +----------+           | 32/C tokens each  |    |
//                 |           |                               +-------------------+    |
//                 |           | + D2   +----------+  st.async           |              |
//                 | y in its  | <----- | h        | <-------------------+              |
//                 | place     | wgmma  | [32, m]  |  to all C blocks                   |
//                 +-----------+ [W2]   +----------+                                    |
//                       +--------------------------------------------------------------+
//
// Products are transposed, D1 = W1 x^T and D2 = W2 h^T, so that the 64 rows a wgmma needs come from the
// weights and a tile has few tokens: little to exchange, many tiles in flight. Every warpgroup works on a
// tile of its own, so one's exchange hides behind another's products; a loading and a storing warp keep
// a ring of tiles moving. What happens to a tile inside a warpgroup: swiglu_adapter/warpgroup.cuh.
//
// The sums over C and over d have a fixed order: reruns are bit-equal.

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

#include "hopper/tensor_map.cuh"
#include "hopper/tma.cuh"
#include "launch.cuh"
#include "mmadapt/swiglu_adapter_cuda.h"
#include "swiglu_adapter/warpgroup.cuh"

namespace mmadapt::swiglu {
namespace {

struct Barriers {
  uint32_t first;
  __device__ __forceinline__ uint32_t full(int buffer) const { return first + 8 * buffer; }
  __device__ __forceinline__ uint32_t ready(int buffer) const {
    return first + 8 * (kMaxBuffers + buffer);
  }
  __device__ __forceinline__ uint32_t empty(int buffer) const {
    return first + 8 * (2 * kMaxBuffers + buffer);
  }
  __device__ __forceinline__ uint32_t sums(int warpgroup) const {
    return first + 8 * (3 * kMaxBuffers + warpgroup);
  }
  __device__ __forceinline__ uint32_t hidden(int warpgroup) const {
    return first + 8 * (3 * kMaxBuffers + kMaxWarpgroups + warpgroup);
  }
};

// The tiles of this cluster: every `step`-th row tile.
struct Tiles {
  int first, step, count;
  __device__ __forceinline__ int row(int n) const { return (first + n * step) * kRows; }
};

__device__ __forceinline__ Tiles my_tiles(const Arguments &a) {
  const int all = static_cast<int>((a.tokens + kRows - 1) / kRows);
  const int cluster = blockIdx.x / a.plan.cluster, clusters = gridDim.x / a.plan.cluster;
  return {cluster, clusters, cluster < all ? (all - cluster + clusters - 1) / clusters : 0};
}

// Which buffer of the ring a tile uses, and the parity of that buffer's barriers.
struct Slot {
  int buffer;
  uint32_t parity;
  __device__ __forceinline__ void advance(int by, int buffers) {
    buffer += by;
    if (buffer >= buffers) buffer -= buffers, parity ^= 1;
  }
};

__device__ __forceinline__ void load_tile(const Arguments &a, const Barriers &barriers,
                                          uint32_t shared, int row, int buffer) {
  const Plan &p = a.plan;
  const int column = static_cast<int>(cluster_block()) * p.columns;
  const uint32_t to = shared + p.tiles + buffer * p.tile_bytes, barrier = barriers.full(buffer);
  barrier_expect(barrier, p.tile_bytes);
  for (int c = 0; c < p.chunks; ++c) {
    const uint32_t chunk = c * (kRows * 128);
    tma_load(to + chunk, &a.input, barrier, column + c * kChunk, row);
    if (p.inputs == 2) {
      tma_load(to + p.tile_bytes / 2 + chunk, &a.second, barrier, column + c * kChunk, row);
    }
  }
}

__device__ __forceinline__ void load_rest(const Arguments &a, const Barriers &barriers,
                                          uint32_t shared, const Tiles &tiles) {
  Slot slot = {0, 0};
  for (int n = a.plan.buffers; n < tiles.count; ++n) {
    barrier_wait(barriers.empty(slot.buffer), slot.parity);
    load_tile(a, barriers, shared, tiles.row(n), slot.buffer);
    slot.advance(1, a.plan.buffers);
  }
}

__device__ __forceinline__ void store_tiles(const Arguments &a, const Barriers &barriers,
                                            uint32_t shared, const Tiles &tiles) {
  const Plan &p = a.plan;
  const int column = static_cast<int>(cluster_block()) * p.columns;
  Slot slot = {0, 0};
  for (int n = 0; n < tiles.count; ++n) {
    const uint32_t from = shared + p.tiles + slot.buffer * p.tile_bytes;
    barrier_wait(barriers.ready(slot.buffer), slot.parity);
    for (int c = 0; c < p.chunks; ++c) {
      tma_store(&a.output, from + c * (kRows * 128), column + c * kChunk, tiles.row(n));
    }
    tma_commit();
    tma_wait_read<0>();
    barrier_arrive(barriers.empty(slot.buffer));
    slot.advance(1, p.buffers);
  }
}

// Why nobody overwrites what another still reads: a block sends the sums of its next tile after it has the
// whole operand of this one, that is after every owner has read this one's sums; and an owner sends an
// operand after it has all sums, that is after every block is done with the last operand.
template <class T, int MP, bool BACKWARD>
__device__ __forceinline__ void compute_tiles(const Arguments &a, const Barriers &barriers,
                                              uint32_t shared, const Tiles &tiles, int index) {
  using S = Stage<MP, BACKWARD>;
  const Plan &p = a.plan;
  Warpgroup w = make_warpgroup<MP, BACKWARD>(p, shared, barriers.sums(index), barriers.hidden(index),
                                             index);
  const bool row_sums = BACKWARD ? a.residual == MMADAPT_RESIDUAL_NORM : a.norm_weight != nullptr;
  Slot ring = {index, 0};
  for (int n = index; n < tiles.count; n += p.warpgroups) {
    const int first_row = tiles.row(n);
    const uint32_t tile = shared + p.tiles + ring.buffer * p.tile_bytes;
    const Routing r = route(a, first_row, w.lane);
    const int slots = p.experts2 == 1 || r.pure() ? 1 : r.high - r.low + 1;
    if (w.thread == 0) {
      barrier_expect(w.sums_barrier, p.sums_bytes + (row_sums ? kRows * 4 : 0));
      barrier_expect(w.hidden_barrier,
                     slots * kRows * S::kDepth2 * 2 + (a.norm_weight != nullptr ? kRows * 4 : 0));
    }
    barrier_wait(barriers.full(ring.buffer), ring.parity);
    {
      float sums[S::kProducts1][16];
      stage1<T, MP, BACKWARD>(sums, a, w, r, tile);
      send_sums<MP, BACKWARD>(sums, w);
    }
    if (row_sums) send_row_sums<T, BACKWARD>(a, w, tile);
    activate<T, MP, BACKWARD>(a, w, r, first_row, slots);
    named_barrier(1 + index, 128);
    broadcast<T, MP, BACKWARD>(a, w, first_row, slots);
    if constexpr (BACKWARD) save_for_weights<T, MP>(a, w, r, first_row, slots);
    stage2<T, MP, BACKWARD>(a, w, r, tile, first_row, slots);
    fence_async_proxy();
    barrier_arrive(barriers.ready(ring.buffer));
    w.parity ^= 1;
    ring.advance(p.warpgroups, p.buffers);
  }
}

template <class T, int MP, bool BACKWARD>
__global__ void __launch_bounds__(Stage<MP, BACKWARD>::kMaxThreads, 1)
    adapter_kernel(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const Plan &p = a.plan;
  const uint32_t shared = local(memory);
  const Barriers barriers = {shared + p.barriers};
  const Tiles tiles = my_tiles(a);
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32, loader = p.warpgroups * 4;
  // One tile a warpgroup is asked for before the weights, which would otherwise queue behind all of them.
  const int first = min(p.buffers, tiles.count), early = min(p.warpgroups, first);
  if (warp == loader && lane == 0) {
    for (int i = 0; i < p.buffers; ++i) {
      barrier_init(barriers.full(i), 1);
      barrier_init(barriers.ready(i), 128);
      barrier_init(barriers.empty(i), 1);
    }
    for (int i = 0; i < p.warpgroups; ++i) {
      barrier_init(barriers.sums(i), 1);
      barrier_init(barriers.hidden(i), 1);
    }
    barrier_init_fence();
    fence_async_proxy();
    for (int n = 0; n < early; ++n) load_tile(a, barriers, shared, tiles.row(n), n);
  }
  __syncwarp();
  cluster_arrive();
  load_weights<T, MP, BACKWARD>(a, shared, cluster_block() * p.columns);
  if (warp == loader && lane == 0) {
    for (int n = early; n < first; ++n) load_tile(a, barriers, shared, tiles.row(n), n);
  }
  __syncwarp();
  fence_async_proxy();
  __syncthreads();  // this block's weights are there
  cluster_wait();   // and every block's barriers
  if (warp < loader) {
    compute_tiles<T, MP, BACKWARD>(a, barriers, shared, tiles, uniform(warp / 4));
  } else if (lane == 0) {
    if (warp == loader) {
      load_rest(a, barriers, shared, tiles);
    } else {
      store_tiles(a, barriers, shared, tiles);
    }
  }
  __syncwarp();
  cluster_arrive();
  cluster_wait();  // no block leaves while another may still write into its shared memory
}

using Kernel = void (*)(Arguments);
constexpr char kName[] = "swiglu_adapter_kernel";

// How many clusters run at once, and permission for clusters of 16. Kept by device and launch shape, since
// asking takes longer than a launch.
cudaError_t resident_clusters(Kernel kernel, const Plan &plan, int *count) {
  static std::mutex mutex;
  static std::map<std::tuple<int, Kernel, int, uint32_t, int>, int> known;
  int device;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const auto key = std::make_tuple(device, kernel, plan.cluster, plan.bytes, plan.warpgroups);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) {
    *count = found->second;
    return cudaSuccess;
  }
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedLimit);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = plan.cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.cluster);
  config.blockDim = dim3(plan.warpgroups * 128 + 64);
  config.dynamicSmemBytes = plan.bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  error = cudaOccupancyMaxActiveClusters(count, kernel, &config);
  if (error != cudaSuccess) return error;
  if (*count < 1) return cudaErrorLaunchOutOfResources;
  known[key] = *count;
  return cudaSuccess;
}

template <class T, int MP, bool BACKWARD>
mmadapt_cuda_status launch_kernel(Arguments &a, int cluster, void *stream) {
  const int experts1 = BACKWARD ? a.up_experts : a.experts;
  const int experts2 = BACKWARD ? a.experts : a.up_experts;
  const int inputs = BACKWARD && a.norm_weight != nullptr ? 2 : 1;
  a.plan = make_plan<MP, BACKWARD>(a.dim, experts1, experts2, inputs, cluster);
  const Plan &plan = a.plan;
  if (plan.cluster == 0) {
    return bad_argument("no plan for this dim, rank, number of experts and cluster: its weights do not fit "
                        "into shared memory, or a block would have no columns");
  }
  mmadapt_cuda_status status = pending_error(kName);
  if (failed(status)) return status;
  const Kernel kernel = &adapter_kernel<T, MP, BACKWARD>;
  int clusters = 0;
  const cudaError_t error = resident_clusters(kernel, plan, &clusters);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cuda_status(error, kName);
  }
  const int64_t tiles = (a.tokens + kRows - 1) / kRows;
  if (clusters > tiles) clusters = static_cast<int>(tiles);
  return launch({kName, dim3(clusters * plan.cluster), dim3(plan.warpgroups * 128 + 64), plan.bytes,
                 stream, static_cast<unsigned>(plan.cluster), /*told=*/true},
                kernel, a);
}

template <class T, bool BACKWARD>
mmadapt_cuda_status launch_rank(Arguments &a, int cluster, void *stream) {
  if (a.rank <= 32) return launch_kernel<T, 32, BACKWARD>(a, cluster, stream);
  if (a.rank <= 64) return launch_kernel<T, 64, BACKWARD>(a, cluster, stream);
  return launch_kernel<T, 128, BACKWARD>(a, cluster, stream);
}

template <bool BACKWARD>
mmadapt_cuda_status launch_dtype(Arguments &a, const mmadapt_swiglu_adapter_sm90 &p) {
  return p.dtype == MMADAPT_BF16 ? launch_rank<__nv_bfloat16, BACKWARD>(a, p.cluster, p.stream)
                                 : launch_rank<__half, BACKWARD>(a, p.cluster, p.stream);
}

bool aligned(const void *pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// The constraint that fails, or null.
const char *refusal(const mmadapt_swiglu_adapter_sm90 &p) {
  if (p.dtype != MMADAPT_BF16 && p.dtype != MMADAPT_F16) return "dtype: expected bf16 or fp16";
  if (p.weight_dtype != p.dtype && p.weight_dtype != MMADAPT_F32) {
    return "weight_dtype: expected dtype or fp32";
  }
  if (p.norm_dtype != p.dtype && p.norm_dtype != MMADAPT_F32) return "norm_dtype: expected dtype or fp32";
  if (p.tokens < 1 || p.tokens > INT32_MAX - kRows) return "tokens: out of range";
  if (p.dim < 8 || p.dim % 8 != 0) return "dim: expected a multiple of 8";
  if (p.rank < 8 || p.rank % 8 != 0 || p.rank > 128) {
    return "rank: expected a multiple of 8, at most 128";
  }
  if (p.experts < 1 || (p.up_experts != 1 && p.up_experts != p.experts)) {
    return "up_experts: expected 1 or as many as experts";
  }
  if (p.experts > 1 && p.expert == nullptr) return "expert: absent, with several experts";
  if (p.residual < MMADAPT_RESIDUAL_NONE || p.residual > MMADAPT_RESIDUAL_NORM) return "residual: out of range";
  if (p.residual == MMADAPT_RESIDUAL_NORM && p.norm_weight == nullptr) {
    return "norm_weight: absent, with the norm as residual";
  }
  const int c = p.cluster;
  if (c < 0 || c > 16 || (c & (c - 1)) != 0) return "cluster: expected 0, 1, 2, 4, 8 or 16";
  for (const void *pointer : {p.x, p.gate, p.down, p.up, p.norm_weight}) {
    if (!aligned(pointer)) return "x, gate, down, up, norm_weight: expected addresses at multiples of 16";
  }
  return nullptr;
}

mmadapt_cuda_status check(const mmadapt_swiglu_adapter_sm90 &p) {
  const char *reason = refusal(p);
  return reason == nullptr ? ok() : bad_argument(reason);
}

Arguments common(const mmadapt_swiglu_adapter_sm90 &p) {
  Arguments a = {};
  a.tokens = p.tokens;
  a.dim = p.dim;
  a.rank = p.rank;
  a.experts = p.experts;
  a.up_experts = p.up_experts;
  a.weight_is_fp32 = p.weight_dtype == MMADAPT_F32;
  a.norm_is_fp32 = p.norm_dtype == MMADAPT_F32;
  a.residual = p.residual;
  a.scale = p.scale;
  a.eps = p.eps;
  a.gate = p.gate;
  a.down = p.down;
  a.up = p.up;
  a.expert = p.expert;
  a.norm_weight = p.norm_weight;
  return a;
}

mmadapt_cuda_status tiles_of(CUtensorMap *map, const void *rows, const mmadapt_swiglu_adapter_sm90 &p) {
  return cuda_status(row_tiles(map, rows, p.tokens, p.dim, kChunk, kRows), kName);
}

template <bool BACKWARD>
Plan plan_of(int dim, int rank, int experts, int up_experts, bool norm) {
  const int experts1 = BACKWARD ? up_experts : experts, experts2 = BACKWARD ? experts : up_experts;
  const int inputs = BACKWARD && norm ? 2 : 1;
  if (rank <= 32) return make_plan<32, BACKWARD>(dim, experts1, experts2, inputs, 0);
  if (rank <= 64) return make_plan<64, BACKWARD>(dim, experts1, experts2, inputs, 0);
  return make_plan<128, BACKWARD>(dim, experts1, experts2, inputs, 0);
}

}  // namespace
}  // namespace mmadapt::swiglu

using namespace mmadapt;

extern "C" mmadapt_swiglu_adapter_plan mmadapt_swiglu_adapter_plan_sm90(int32_t dim, int32_t rank,
                                                                        int32_t experts,
                                                                        int32_t up_experts,
                                                                        int32_t norm,
                                                                        int32_t backward) {
  const swiglu::Plan p = backward ? swiglu::plan_of<true>(dim, rank, experts, up_experts, norm)
                                  : swiglu::plan_of<false>(dim, rank, experts, up_experts, norm);
  return {p.cluster, p.columns, p.warpgroups, p.buffers, static_cast<int32_t>(p.bytes)};
}

extern "C" mmadapt_cuda_status mmadapt_swiglu_adapter_forward_cuda(
    const mmadapt_swiglu_adapter_forward_sm90 *call) {
  const mmadapt_swiglu_adapter_sm90 &p = call->problem;
  mmadapt_cuda_status status = swiglu::check(p);
  if (failed(status)) return status;
  swiglu::Arguments a = swiglu::common(p);
  a.zg = call->zg;
  a.zd = call->zd;
  a.rstd = call->rstd;
  if (failed(status = swiglu::tiles_of(&a.input, p.x, p))) return status;
  if (failed(status = swiglu::tiles_of(&a.output, call->y, p))) return status;
  return swiglu::launch_dtype<false>(a, p);
}

extern "C" mmadapt_cuda_status mmadapt_swiglu_adapter_dx_cuda(const mmadapt_swiglu_adapter_dx_sm90 *call) {
  const mmadapt_swiglu_adapter_sm90 &p = call->problem;
  mmadapt_cuda_status status = swiglu::check(p);
  if (failed(status)) return status;
  if (!swiglu::aligned(call->dy)) return bad_argument("dy: expected an address at a multiple of 16");
  swiglu::Arguments a = swiglu::common(p);
  a.zg = const_cast<void *>(call->zg);  // the backward only reads what the forward writes
  a.zd = const_cast<void *>(call->zd);
  a.rstd = const_cast<float *>(call->rstd);
  a.dz = call->dz;
  a.h = call->h;
  a.dz_experts = call->dz_experts;
  a.h_experts = call->h_experts;
  if (failed(status = swiglu::tiles_of(&a.input, call->dy, p))) return status;
  if (failed(status = swiglu::tiles_of(&a.output, call->dx, p))) return status;
  if (p.norm_weight != nullptr && failed(status = swiglu::tiles_of(&a.second, p.x, p))) return status;
  return swiglu::launch_dtype<true>(a, p);
}
