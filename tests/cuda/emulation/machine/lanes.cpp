// What the 32 lanes of a warp do together.
#include "state.h"

namespace machine {
namespace {

struct BlockAccess {
  uint32_t address, registers[4];
};

BlockAccess access_of(const Slot &slot) {
  BlockAccess access;
  std::memcpy(&access, &slot, sizeof(access));
  return access;
}

Slot to_slot(const BlockAccess &access) {
  Slot slot = {};
  std::memcpy(&slot, &access, sizeof(access));
  return slot;
}

// The two numbers of a lane in each of four 8 x 8 blocks, whose rows the lanes name.
template <class Call>
void each_pair(int warp, Call call) {
  const Warp &w = state.of_warps[warp];
  for (int lane = 0; lane < 32; ++lane) {
    for (int block = 0; block < 4; ++block) {
      const uint32_t row = access_of(w.given[8 * block + lane / 4]).address;
      if (row % 16 != 0) fault("misaligned row of an 8 x 8 block");
      call(lane, block, place(warp / state.warps, row, 16) + lane % 4 * 4);
    }
  }
}

void add_product(Warp &w) {
  WarpProduct product;
  for (int lane = 0; lane < 32; ++lane) std::memcpy(&product.lanes[lane], &w.given[lane], sizeof(Product));
  const Product &first = product.lanes[0];
  for (const Product &p : product.lanes) {
    if (p.a != first.a || p.b != first.b || p.n != first.n) fault("wgmma: lanes name different operands");
  }
  w.products.push_back(product);
}

}  // namespace

Slot *together(Together what, uint32_t which, const Slot &mine) {
  Fiber &f = state.fiber();
  Warp &w = state.of_warps[state.current / 32];
  w.given[lane()] = mine;
  f.what = what;
  f.which = which;
  wait_for(Waits::kLanes);
  return w.all;
}

void load_blocks(uint32_t (&r)[4], uint32_t address) {
  together(Together::kLoadBlocks, 0, to_slot({address, {}}));
  std::memcpy(r, state.of_warps[state.current / 32].blocks[lane()], sizeof(r));
}

void store_blocks(uint32_t address, const uint32_t (&r)[4]) {
  state.fiber().unfenced = true;
  together(Together::kStoreBlocks, 0, to_slot({address, {r[0], r[1], r[2], r[3]}}));
}

void meet(int warp) {
  Warp &w = state.of_warps[warp];
  Fiber *lanes = &state.fibers[warp * 32];
  for (int lane = 0; lane < 32; ++lane) {
    state.current = warp * 32 + lane;
    if (lanes[lane].what != lanes[0].what || lanes[lane].which != lanes[0].which) {
      fault("lanes of a warp are at different operations, %d and %d", int(lanes[0].what), int(lanes[lane].what));
    }
  }
  switch (lanes[0].what) {
    case Together::kLoadBlocks:
      each_pair(warp, [&](int lane, int block, char *at) { std::memcpy(&w.blocks[lane][block], at, 4); });
      break;
    case Together::kStoreBlocks:
      each_pair(warp, [&](int lane, int block, char *at) {
        const BlockAccess access = access_of(w.given[lane]);
        std::memcpy(at, &access.registers[block], 4);
      });
      break;
    case Together::kProduct:
      add_product(w);
      break;
    case Together::kCommit:
      w.product_groups.push_back(std::move(w.products));
      w.products.clear();
      break;
    case Together::kWait:
      if (!w.products.empty()) fault("wgmma: a wait before the products are committed");
      while (w.product_groups.size() > lanes[0].which) run_product_group(warp);
      break;
    default:
      std::memcpy(w.all, w.given, sizeof(w.all));
  }
  for (int lane = 0; lane < 32; ++lane) lanes[lane].waits = Waits::kNothing;
}

}  // namespace machine
