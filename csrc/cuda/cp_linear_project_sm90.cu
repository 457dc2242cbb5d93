// The factored linear layer on Hopper: z = x factor_in^T and the cores scale * z M_k.
//
// x is read once, at the speed of memory. A cluster owns 128 rows, each of its blocks a part of K:
//
//      memory         block 0 .. split-1 of a cluster                                    memory
//        |      TMA   +---------------------+  wgmma   +----------+  shared memory
//        +----------> | x      [128, 64]    | -------> | sums     |  of the cluster  +------------+
//        |            | factor [RP, 64]     |          | [128, RP]| ---------------> | z: parts   |
//        +----------> |   x stages          |          +----------+   each block     | added in   |--> z
//                     +---------------------+              128/split rows            | order, mode|--> cores
//                                                                                    +------------+
//
// Two blocks may share an SM, so that one's end hides behind the other's loads; K is not split further than
// one block an SM. The number of parts is a function of the shape, and they are added in order: reruns are
// bit-equal. How z becomes the cores: cp_linear/project_finish.cuh. The kernel after this one may start beside
// it, and waits for it itself.

#include "cp_linear/project_finish.cuh"
#include "hopper/roles.cuh"
#include "hopper/tensor_map.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma_gemm.cuh"
#include "launch.cuh"
#include "resident.cuh"
#include "vec.cuh"

namespace mmadapt::cp_linear::project {
namespace {

template <int RP>
struct Barriers {
  uint32_t first;
  __device__ __forceinline__ uint32_t full(int slot) const { return first + 8 * slot; }
  __device__ __forceinline__ uint32_t empty(int slot) const {
    return first + 8 * (Layout<RP>::kStages + slot);
  }
};

// This block's chunks of K.
struct Part {
  int first, count;
};
__device__ __forceinline__ Part my_part(const Arguments &a, int block) {
  const int each = (a.chunks + a.split - 1) / a.split, first = block * each;
  return {first, max(0, min(each, a.chunks - first))};
}

template <int RP>
__device__ __forceinline__ void load_chunks(const Arguments &a, const Barriers<RP> &barriers,
                                            uint32_t shared, const Part &part, int row) {
  using L = Layout<RP>;
  int slot = 0;
  uint32_t parity = 0;
  for (int c = 0; c < part.count; ++c) {
    const uint32_t stage = shared + slot * L::kStageBytes, full = barriers.full(slot);
    const int column = (part.first + c) * kChunk;
    hopper::barrier_wait(barriers.empty(slot), parity ^ 1);
    hopper::barrier_expect(full, L::kStageBytes);
    hopper::tma_load(stage, &a.x, full, column, row);
    hopper::tma_load(stage + L::kLeftBytes, &a.factor, full, column, 0);
    if (++slot == L::kStages) slot = 0, parity ^= 1;
  }
}

// The sums of a warpgroup's 64 rows over this block's chunks.
template <class T, int RP>
__device__ __forceinline__ void multiply_chunks(float (&d)[RP / 2], const Barriers<RP> &barriers,
                                                uint32_t shared, const Part &part, int group, int lane) {
  namespace wg = hopper::gemm;
  using L = Layout<RP>;
  const uint32_t left = hopper::low_word(shared + group * (64 * 128));
  const uint32_t right = hopper::low_word(shared + L::kLeftBytes);
  int slot = 0, before = 0;
  uint32_t parity = 0;
#pragma unroll
  for (int i = 0; i < RP / 2; ++i) d[i] = 0.0f;
  for (int c = 0; c < part.count; ++c) {
    hopper::barrier_wait(barriers.full(slot), parity);
    const uint32_t at = slot * (L::kStageBytes >> 4);
    hopper::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      wg::multiply<T, wg::Major::K>(d, left + at + k * wg::kStep<wg::Major::K>,
                                    right + at + k * wg::kStep<wg::Major::K>, 1);
    }
    hopper::wgmma_commit();
    hopper::wgmma_wait<1>();
    hopper::barrier_arrive_if(lane == 0 && c > 0, barriers.empty(before));
    before = slot;
    if (++slot == L::kStages) slot = 0, parity ^= 1;
  }
  hopper::wgmma_wait<0>();
  hopper::wgmma_pin(d);
}

template <int RP>
__device__ __forceinline__ void keep_sums(const float (&d)[RP / 2], float *sums, int warp, int lane) {
  constexpr int kStride = Layout<RP>::kStride;
  float *const to = sums + (warp * 16 + lane / 4) * kStride + 2 * (lane % 4);
#pragma unroll
  for (int j = 0; j < RP / 8; ++j) {
    *reinterpret_cast<float2 *>(to + 8 * j) = {d[4 * j], d[4 * j + 1]};
    *reinterpret_cast<float2 *>(to + 8 * kStride + 8 * j) = {d[4 * j + 2], d[4 * j + 3]};
  }
}

template <class T, int RP>
__global__ void __launch_bounds__(kThreads, 2)
    cp_linear_project_kernel(const __grid_constant__ Arguments a) {
  using L = Layout<RP>;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = hopper::local(memory);
  const Barriers<RP> barriers = {shared + L::kBarriers};
  const int warp = hopper::uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  const int block = static_cast<int>(hopper::cluster_block());
  const int row = int(blockIdx.x) / a.split * kRows;
  const Part part = my_part(a, block);
  hopper::allow_next_kernel();
  if (threadIdx.x == 0) {
    for (int i = 0; i < L::kStages; ++i) {
      hopper::barrier_init(barriers.full(i), 1);
      hopper::barrier_init(barriers.empty(i), kConsumers / 32);
    }
    hopper::barrier_init_fence();
    hopper::fence_async_proxy();
  }
  __syncthreads();
  if (warp == kConsumers / 32) {
    if (lane == 0) load_chunks<RP>(a, barriers, shared, part, row);
  } else {
    float d[RP / 2];
    multiply_chunks<T, RP>(d, barriers, shared, part, warp / 4, lane);
    hopper::named_barrier(1, kConsumers);  // the stages are no longer read
    keep_sums<RP>(d, reinterpret_cast<float *>(memory), warp, lane);
  }
  __syncwarp();
  hopper::cluster_arrive();
  hopper::cluster_wait();
  if (warp < kConsumers / 32) finish<T, RP>(a, memory, shared, row, block, threadIdx.x);
  __syncwarp();
  hopper::cluster_arrive();
  hopper::cluster_wait();  // no block leaves while another may still read its sums
}

constexpr char kName[] = "cp_linear_project_kernel";

// The constraint that fails, or null.
const char *refusal(const mmadapt_cp_linear_project_sm90 &p) {
  if (p.dtype != MMADAPT_BF16 && p.dtype != MMADAPT_F16) return "dtype: expected bf16 or fp16";
  if (p.tokens < 1 || p.tokens > INT32_MAX - kRows) return "tokens: out of range";
  if (p.dim < 8 || p.dim % 8 != 0) return "dim: expected a multiple of 8";
  if (p.rank < 8 || p.rank % 8 != 0 || p.rank > MMADAPT_CP_LINEAR_MAX_RANK) {
    return "rank: expected a multiple of 8, at most 128";
  }
  if (const char *reason = cores_refusal(p)) return reason;
  const int s = p.split;
  if (s < 0 || s > kMaxSplit || (s & (s - 1)) != 0) return "split: expected 0, 1, 2, 4 or 8";
  for (const void *pointer : {p.x, p.factor_in, static_cast<const void *>(p.z),
                              static_cast<const void *>(p.core)}) {
    if (!aligned16(pointer)) return "x, factor_in, z, core: expected addresses at multiples of 16";
  }
  return nullptr;
}

template <class T, int RP>
mmadapt_cuda_status launch_rank(Arguments &a, const mmadapt_cp_linear_project_sm90 &p) {
  mmadapt_cuda_status status = pending_error(kName);
  if (failed(status)) return status;
  const auto kernel = &cp_linear_project_kernel<T, RP>;
  int clusters = 0;
  cudaError_t error = resident_clusters(reinterpret_cast<const void *>(kernel), a.split, kThreads,
                                        Layout<RP>::kBytes, Layout<RP>::kBytes, &clusters);
  if (error == cudaSuccess && clusters < 1) error = cudaErrorLaunchOutOfResources;
  if (error == cudaSuccess) error = row_tiles(&a.x, p.x, p.tokens, p.dim, kRows);
  if (error == cudaSuccess) error = row_tiles(&a.factor, p.factor_in, p.rank, p.dim, RP);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cuda_status(error, kName);
  }
  const int64_t blocks = (p.tokens + kRows - 1) / kRows * a.split;
  if (blocks > INT32_MAX) return bad_argument("tokens: too many tiles");
  return launch({kName, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), Layout<RP>::kBytes, p.stream,
                 static_cast<unsigned>(a.split), /*told=*/true},
                kernel, a);
}

template <class T>
mmadapt_cuda_status launch_type(Arguments &a, const mmadapt_cp_linear_project_sm90 &p) {
  if (p.rank <= 16) return launch_rank<T, 16>(a, p);
  if (p.rank <= 32) return launch_rank<T, 32>(a, p);
  if (p.rank <= 64) return launch_rank<T, 64>(a, p);
  return launch_rank<T, 128>(a, p);
}

// 16-bit copies of two fp32 arrays, eight numbers a thread.
template <class T>
__global__ void __launch_bounds__(256)
    cp_linear_pack_kernel(const float *__restrict__ first, const float *__restrict__ second,
                          T *__restrict__ first_out, T *__restrict__ second_out, int64_t first_eights,
                          int64_t eights) {
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= eights) return;
  const bool is_second = i >= first_eights;
  const int64_t at = (is_second ? i - first_eights : i) * 8;
  const float *from = (is_second ? second : first) + at;
  const auto low = load<float, 4>(from), high = load<float, 4>(from + 4);
  const float values[8] = {low.at[0],  low.at[1],  low.at[2],  low.at[3],
                           high.at[0], high.at[1], high.at[2], high.at[3]};
  store_row<T>(is_second ? second_out : first_out, at, values);
}

template <class T>
mmadapt_cuda_status launch_pack(const mmadapt_cp_linear_pack_sm90 &p) {
  const int64_t first = p.first_size / 8, all = first + p.second_size / 8;
  return launch({"cp_linear_pack_kernel", dim3(static_cast<unsigned>((all + 255) / 256)), dim3(256), 0,
                 p.stream},
                cp_linear_pack_kernel<T>, p.first, p.second, static_cast<T *>(p.first_out),
                static_cast<T *>(p.second_out), first, all);
}

}  // namespace
}  // namespace mmadapt::cp_linear::project

using namespace mmadapt;

extern "C" mmadapt_cuda_status mmadapt_cp_linear_project_cuda(
    const mmadapt_cp_linear_project_sm90 *call) {
  using namespace cp_linear::project;
  const mmadapt_cp_linear_project_sm90 &p = *call;
  if (const char *reason = refusal(p)) return bad_argument(reason);
  Arguments a = {};
  a.chunks = (p.dim + kChunk - 1) / kChunk;
  a.split = p.split != 0 ? p.split : choose_split((p.tokens + kRows - 1) / kRows, a.chunks);
  a.dense = p.dense;
  a.cores = cp_linear::cores_of(p);
  return p.dtype == MMADAPT_BF16 ? launch_type<__nv_bfloat16>(a, p) : launch_type<__half>(a, p);
}

extern "C" mmadapt_cuda_status mmadapt_cp_linear_pack_cuda(const mmadapt_cp_linear_pack_sm90 *call) {
  using namespace cp_linear::project;
  const mmadapt_cp_linear_pack_sm90 &p = *call;
  if (p.dtype != MMADAPT_BF16 && p.dtype != MMADAPT_F16) return bad_argument("dtype: expected bf16 or fp16");
  constexpr int64_t kMost = int64_t(INT32_MAX) * 8;
  if (p.first_size < 0 || p.first_size % 8 != 0 || p.second_size < 0 || p.second_size % 8 != 0 ||
      p.first_size > kMost - p.second_size) {
    return bad_argument("first_size, second_size: expected multiples of 8");
  }
  for (const void *pointer : {static_cast<const void *>(p.first), static_cast<const void *>(p.second),
                              static_cast<const void *>(p.first_out),
                              static_cast<const void *>(p.second_out)}) {
    if (!aligned16(pointer)) {
      return bad_argument("first, second and their copies: expected addresses at multiples of 16");
    }
  }
  return p.dtype == MMADAPT_BF16 ? launch_pack<__nv_bfloat16>(p) : launch_pack<__half>(p);
}
