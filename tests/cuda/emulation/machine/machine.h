// A Hopper GPU as far as the kernels of csrc/cuda/swiglu_adapter need one, on one CPU thread.
//
// It runs a kernel cluster by cluster. Each GPU thread is a fiber that runs until it waits for somebody, or until
// the machine interrupts it before or after a memory operation; who runs next, and when what is asynchronous
// happens, is drawn from a seed. The draws are hostile, not likely: one seed favours some warps for long, another
// lets transfers land newest first, or only once nobody can run otherwise.
//
// Modelled, with an error where the kernel breaks the rule:
//   mbarriers     phases, arrivals and bytes; who waits for a parity waits for one phase: that the barrier goes on to
//                 the next before he has seen it, or lets him pass in another, is an error
//   TMA loads     the destination is NaN from when it is asked for until it lands, which is late and in any order
//   st.async      lands late and in any order, in any block of the cluster
//   TMA stores    read their source late: at the wait for their group at the latest
//   wgmma         reads shared memory late: at the wait for its group at the latest
//   warps         shuffles, ldmatrix, stmatrix, wgmma and the like want all 32 lanes at the same operation; between
//                 two of them lanes run in any order, and some of them far ahead
//   barriers      named, of a block and of a cluster
//   proxies       stmatrix without a fence before the next named barrier is an error
//   shared memory starts as NaN; accesses are checked for range and alignment
//   at the end    nobody waits (deadlock), and no transfer or product is outstanding
//
// Not modelled: registers and their limits, the memory model of global memory and of plain stores to shared memory
// (they take effect at once, in program order), the order of the generic and the async proxy beyond stmatrix,
// wgmma.fence and registers of a wgmma that change before its wait, that the four warps of a warpgroup multiply
// together, bank conflicts, caches, time, several clusters at once, programmatic dependent launch, PTX and SASS
// themselves: what replaces csrc/cuda/hopper is written by hand.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct CUtensorMap;

// Which fault is on, of those that a test plants into a copy of the kernels.
extern "C" int machine_planted;

namespace machine {

// Addresses of shared memory: a block's window begins here; the cluster's block + 1 stands in the top byte of an
// address that names another block.
constexpr uint32_t kWindow = 1024;
constexpr int kPeerShift = 24;

// What 32 lanes do together.
enum class Together {
  kShuffle, kSyncWarp, kLoadBlocks, kStoreBlocks, kProduct, kCommit, kWait, kNamedBarrier, kClusterArrive, kClusterWait
};

// What a lane hands to the others.
struct Slot {
  uint64_t words[8];
};

// Of one lane: D (64 x n) += A B. A in four registers, or at descriptor `a`.
struct Product {
  float *d;
  int n;
  bool fp16, transposed, has_registers;
  uint32_t registers[4], a, b, b_high;
};

// Called by fibers.
Slot *together(Together what, uint32_t which, const Slot &mine);  // what all lanes handed in
int lane();
uint32_t block_in_cluster();
char *shared(uint32_t address, int bytes);
void load_blocks(uint32_t (&r)[4], uint32_t address);
void store_blocks(uint32_t address, const uint32_t (&r)[4]);
void barrier_init(uint32_t address, uint32_t arrivals);
void barrier_arrive(uint32_t address, uint32_t arrivals, uint32_t bytes);
void barrier_wait(uint32_t address, uint32_t parity);
void named_barrier(uint32_t id, uint32_t threads);
void cluster_arrive();
void cluster_wait();
void fence_async_proxy();
void store_async(uint32_t to, const void *data, int bytes, uint32_t barrier);
void tma_load(uint32_t to, const CUtensorMap *map, uint32_t barrier, int c0, int c1, int c2);
void tma_store(const CUtensorMap *map, uint32_t from, int c0, int c1);
void tma_commit();
void tma_wait_read(int left);
void product(const Product &p);
void product_commit();
void product_wait(int left);

// Runs a kernel; false after a fault, which machine_message() of launch.cpp tells. cluster 0: the kernel's threads do
// not meet each other and run one after another.
bool run(unsigned blocks, unsigned threads, size_t shared_bytes, unsigned cluster,
         const std::function<void()> &thread);

}  // namespace machine
