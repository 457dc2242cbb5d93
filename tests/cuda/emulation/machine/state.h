// The state of the cluster that runs, and what the parts of the machine ask of each other.
#pragma once

#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "cuda.h"
#include "machine.h"

namespace machine {

constexpr int kMostBarriers = 64, kNamedBarriers = 16;
constexpr int kMostCluster = 8, kMostThreads = 1024;

struct BulkStore {
  CUtensorMap map;
  uint32_t from;
  int c0, c1;
};

enum class Waits { kNothing, kLanes, kBarrier, kNamedBarrier, kCluster, kEnded };

struct Fiber {
  void *stack = nullptr;  // its pointer, while another runs
  Waits waits = Waits::kNothing;
  Together what = {};      // with kLanes
  uint32_t which = 0;      // with kLanes; with the barriers: address or id
  uint32_t parity = 0;
  long generation = 0;     // of the named barrier, before it opens
  long cluster_arrivals = 0;
  bool unfenced = false;   // has stored what the async proxy may not see yet
  std::vector<BulkStore> stores;  // not committed yet
  std::deque<std::vector<BulkStore>> store_groups;
  // Of each barrier the phase that this thread waited for last, counted from 0.
  long phase[kMostBarriers];
};

struct WarpProduct {
  Product lanes[32];
};

struct Warp {
  Slot given[32];     // by the lanes that have come
  Slot all[32];       // by all of them, the last time that they met
  uint32_t blocks[32][4];  // what load_blocks found
  std::vector<WarpProduct> products;  // not committed yet
  std::deque<std::vector<WarpProduct>> product_groups;
  long idle_since = -1;  // `changes` when no lane could run
};

struct Barrier {
  bool exists = false;
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;
  long phase = 0;  // completed
};

struct NamedBarrier {
  unsigned arrived = 0;
  long generation = 0;
};

struct Block {
  std::vector<char> memory;
  // Barriers lie behind all else, the one that is initialised first in front.
  uint32_t first_barrier = ~0u;
  Barrier barriers[kMostBarriers];
  NamedBarrier named[kNamedBarriers];
  unsigned index = 0;  // in the grid
};

// A TMA load, or with `map.base` null an st.async.
struct Transfer {
  int block;
  uint32_t to, barrier;
  int bytes;
  char data[16];
  CUtensorMap map;
  int c0, c1, c2;
};

struct State {
  int cluster, threads, warps;  // blocks of a cluster; of a block
  size_t shared_bytes;
  std::vector<Fiber> fibers;
  std::vector<Warp> of_warps;
  std::vector<Block> blocks;
  std::deque<Transfer> transfers;
  long cluster_arrived, cluster_phase;
  const std::function<void()> *thread;
  int current;       // fiber
  long changes;      // of anything that lets somebody go on
  bool interrupted;  // a fiber gave up its turn though it could go on
  bool failed;
  std::string message;

  int block() const { return current / threads; }
  int block_of(const Fiber &f) const { return static_cast<int>(&f - fibers.data()) / threads; }
  Fiber &fiber() { return fibers[current]; }
};
extern State state;

struct Fault {};  // thrown by fault() outside of fibers

// Ends the run. In a fiber: does not return, since nobody runs it again.
[[noreturn]] void fault(const char *format, ...) __attribute__((format(printf, 1, 2)));

// memory.cpp
void seed(uint64_t value);
uint64_t draw();
double draw_unit();

// fiber.cpp: waits until the schedule runs this fiber again; or only with some probability, to be interrupted.
void make_fiber(int index);
void resume(int index);
void wait_for(Waits what);
void maybe_interrupt(double probability);

// A checked place in a block's shared memory.
char *place(int block, uint32_t address, int bytes);
// Where the swizzle of rows of 128 or 64 bytes puts what belongs at an address.
uint32_t swizzled(uint32_t address, int row_bytes);

// barriers.cpp
bool may_go_on(Fiber &f);
void bytes_landed(int block, uint32_t barrier, int bytes);
int barrier_index(int block, uint32_t address);

// transfers.cpp, products.cpp: what is asynchronous takes place.
void land(const Transfer &transfer);
void read_store_group(Fiber &f);
void run_product_group(int warp);

// lanes.cpp: all 32 are there.
void meet(int warp);

// schedule.cpp
void run_cluster();

}  // namespace machine
