// mbarriers, named barriers and the cluster's barrier.
#include "state.h"

namespace machine {
namespace {

Barrier &find(int block, uint32_t address) {
  return state.blocks[block].barriers[barrier_index(block, address)];
}

void settle(Barrier &b) {
  if (b.pending != 0 || b.bytes != 0) return;
  b.phase++;
  b.pending = b.arrivals;
  state.changes++;
}

}  // namespace

int barrier_index(int block, uint32_t address) {
  const Block &b = state.blocks[block];
  const uint32_t index = (address - b.first_barrier) / 8;
  if (address < b.first_barrier || address % 8 != 0 || index >= kMostBarriers || !b.barriers[index].exists) {
    fault("there is no barrier at %u", address);
  }
  return static_cast<int>(index);
}

void barrier_init(uint32_t address, uint32_t arrivals) {
  Block &b = state.blocks[state.block()];
  if (b.first_barrier == ~0u) b.first_barrier = address;
  const uint32_t index = (address - b.first_barrier) / 8;
  if (address < b.first_barrier || address + 8 > kWindow + state.shared_bytes || index >= kMostBarriers) {
    fault("no room for a barrier at %u", address);
  }
  b.barriers[index] = {true, static_cast<int>(arrivals), static_cast<int>(arrivals), 0, 0};
}

void barrier_arrive(uint32_t address, uint32_t arrivals, uint32_t bytes) {
  maybe_interrupt(0.2);
  Barrier &b = find(state.block(), address);
  if (b.pending < static_cast<int>(arrivals)) {
    fault("too many arrivals at barrier %d: %u, where %d are pending", barrier_index(state.block(), address), arrivals,
          b.pending);
  }
  b.bytes += bytes;
  b.pending -= arrivals;
  settle(b);
  maybe_interrupt(0.3);
}

void bytes_landed(int block, uint32_t barrier, int bytes) {
  Barrier &b = find(block, barrier);
  b.bytes -= bytes;
  settle(b);
}

void barrier_wait(uint32_t address, uint32_t parity) {
  Fiber &f = state.fiber();
  long &phase = f.phase[barrier_index(state.block(), address)];
  if (phase == -2) {
    phase = parity == 0 ? 0 : -1;  // -1: what has completed before anybody arrives
  } else if ((phase & 1) != static_cast<long>(parity)) {
    phase++;
  }
  f.which = address;
  f.parity = parity;
  wait_for(Waits::kBarrier);
}

void named_barrier(uint32_t id, uint32_t threads) {
  together(Together::kNamedBarrier, id, {});
  Fiber &f = state.fiber();
  if (f.unfenced) fault("stores to shared memory without a proxy fence before barrier %u", id);
  NamedBarrier &b = state.blocks[state.block()].named[id];
  f.which = id;
  f.generation = b.generation;
  if (++b.arrived == threads) {
    b.arrived = 0;
    b.generation++;
    state.changes++;
  }
  wait_for(Waits::kNamedBarrier);
}

void cluster_arrive() {
  together(Together::kClusterArrive, 0, {});
  Fiber &f = state.fiber();
  if (f.cluster_arrivals > state.cluster_phase) fault("arrives twice at the cluster's barrier");
  f.cluster_arrivals++;
  if (++state.cluster_arrived == long(state.cluster) * state.threads) {
    state.cluster_arrived = 0;
    state.cluster_phase++;
    state.changes++;
  }
}

void cluster_wait() {
  together(Together::kClusterWait, 0, {});
  wait_for(Waits::kCluster);
}

void fence_async_proxy() { state.fiber().unfenced = false; }

bool may_go_on(Fiber &f) {
  const int block = state.block_of(f);
  switch (f.waits) {
    case Waits::kNothing:
      return true;
    case Waits::kNamedBarrier:
      return state.blocks[block].named[f.which].generation != f.generation;
    case Waits::kCluster:
      return state.cluster_phase >= f.cluster_arrivals;
    case Waits::kBarrier: {
      const int index = barrier_index(block, f.which);
      const long now = state.blocks[block].barriers[index].phase, wanted = f.phase[index];
      state.current = static_cast<int>(&f - state.fibers.data());
      if (now > wanted + 1) fault("barrier %d has gone on to phase %ld, phase %ld is waited for", index, now, wanted);
      const bool passes = (now & 1) != static_cast<long>(f.parity);
      if (passes && now != wanted + 1) fault("barrier %d passes in phase %ld who waits for %ld", index, now, wanted);
      return passes;
    }
    default:
      return false;
  }
}

}  // namespace machine
