// Entry points: check, sort tokens by expert, and run the kernel made for this machine.

#include "mmadapt/swiglu_adapter.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "kernel.h"

namespace {

struct Kernel {
  const char *isa;
  mmadapt::Forward *forward;
  mmadapt::Backward *backward;
};

constexpr Kernel kGeneric{"generic", mmadapt::forward_generic, mmadapt::backward_generic};
#ifdef MMADAPT_HAVE_X86_KERNELS
constexpr Kernel kAvx2{"avx2", mmadapt::forward_avx2, mmadapt::backward_avx2};
constexpr Kernel kAvx512{"avx512", mmadapt::forward_avx512, mmadapt::backward_avx512};
#endif

const Kernel &select_kernel() {
#ifdef MMADAPT_HAVE_X86_KERNELS
  __builtin_cpu_init();
  const char *cap = std::getenv("MMADAPT_CPU_ISA");
  if (cap != nullptr && std::strcmp(cap, "generic") == 0) return kGeneric;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && !(cap != nullptr && std::strcmp(cap, "avx2") == 0)) return kAvx512;
  if (avx2) return kAvx2;
#endif
  return kGeneric;
}

const Kernel &kernel() {
  static const Kernel &selected = select_kernel();
  return selected;
}

// Stable counting sort of the tokens by expert.
class RoutingTable {
 public:
  mmadapt_status build(const mmadapt_swiglu_adapter &p) {
    offsets_.assign(p.experts + 2, 0);
    if (p.expert == nullptr) {
      for (int64_t e = 1; e < p.experts + 2; ++e) offsets_[e] = p.tokens;
      return MMADAPT_OK;
    }
    for (int64_t t = 0; t < p.tokens; ++t) {
      if (p.expert[t] < -1 || p.expert[t] >= p.experts) return MMADAPT_EXPERT_OUT_OF_RANGE;
      offsets_[bucket(p, t) + 1]++;
    }
    for (int64_t e = 0; e < p.experts + 1; ++e) offsets_[e + 1] += offsets_[e];
    rows_.resize(p.tokens);
    std::vector<int64_t> next(offsets_.begin(), offsets_.end() - 1);
    for (int64_t t = 0; t < p.tokens; ++t) rows_[next[bucket(p, t)]++] = t;
    return MMADAPT_OK;
  }
  mmadapt::Routing view() const {
    return {rows_.empty() ? nullptr : rows_.data(), offsets_.data()};
  }

 private:
  static int64_t bucket(const mmadapt_swiglu_adapter &p, int64_t t) {
    return p.expert[t] < 0 ? p.experts : p.expert[t];
  }
  std::vector<int64_t> rows_, offsets_;
};

constexpr int64_t kKeepBytes = int64_t{64} << 20;

struct ThreadMemory {
  void *memory = nullptr;
  int64_t bytes = 0;
  void resize(int64_t wanted) {
    std::free(memory);
    memory = wanted == 0 ? nullptr : std::aligned_alloc(64, wanted);
    bytes = memory == nullptr ? 0 : wanted;
  }
  ~ThreadMemory() { std::free(memory); }
};
thread_local ThreadMemory thread_memory;

template <class Function, class Arguments>
mmadapt_status dispatch(const mmadapt_swiglu_adapter *p, Function *function,
                        const Arguments &arguments) {
  if (p->tokens < 0 || p->dim < 1 || p->rank < 1 || p->experts < 1 || p->threads < 1 ||
      (p->up_experts != 1 && p->up_experts != p->experts))
    return MMADAPT_BAD_ARGUMENT;
  try {
    RoutingTable routing;
    const mmadapt_status status = routing.build(*p);
    return status == MMADAPT_OK ? function(*p, routing.view(), arguments) : status;
  } catch (const std::bad_alloc &) {
    return MMADAPT_OUT_OF_MEMORY;
  }
}

}  // namespace

float *mmadapt::acquire_scratch(int64_t bytes) {
  if (bytes > thread_memory.bytes) thread_memory.resize((bytes + 63) / 64 * 64);
  return static_cast<float *>(thread_memory.memory);
}

void mmadapt::release_scratch() {
  if (thread_memory.bytes > kKeepBytes) thread_memory.resize(0);
}

mmadapt_status mmadapt_swiglu_adapter_forward(const mmadapt_swiglu_adapter *problem,
                                              const mmadapt_swiglu_adapter_outputs *outputs) {
  return dispatch(problem, kernel().forward, *outputs);
}

mmadapt_status mmadapt_swiglu_adapter_backward(const mmadapt_swiglu_adapter *problem,
                                               const mmadapt_swiglu_adapter_gradients *gradients) {
  return dispatch(problem, kernel().backward, *gradients);
}

const char *mmadapt_cpu_isa(void) { return kernel().isa; }

const char *mmadapt_cpu_isa_compiled(void) {
#ifdef MMADAPT_HAVE_X86_KERNELS
  return "generic, avx2, avx512";
#else
  return "generic";
#endif
}
