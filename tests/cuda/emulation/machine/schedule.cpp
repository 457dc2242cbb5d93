// Who runs next, and when what is asynchronous takes place.
#include <algorithm>
#include <map>

#include "state.h"

namespace machine {
namespace {

// Whom a schedule favours, for long times: nobody; some warps; blocks; warpgroups of blocks; the same warpgroup of all
// blocks.
enum class Favours { kNobody, kWarps, kBlocks, kWarpgroups, kRoles };
// Which transfer lands.
enum class Landing { kAny, kOldest, kNewest };

constexpr int kWarpsOfGroup = 4;

class Schedule {
 public:
  Schedule() {
    warps_ = state.cluster * state.warps;
    favours_ = static_cast<Favours>(draw() % 5);
    const double lands[] = {0.5, 0.05, 0.0, 0.0}, finishes[] = {0.0, 0.3, 0.02};
    const int landing = draw() % 4;
    lands_ = lands[landing];
    landing_ = landing == 3 ? Landing::kNewest : landing == 2 && draw() % 2 ? Landing::kOldest : Landing::kAny;
    finishes_ = finishes[draw() % 3];
    skips_ = draw() % 3 == 0 ? 0.3 : 0.0;
    order_.resize(warps_);
    arrange();
  }

  void run() {
    while (true) {
      skipped_ = false;
      const bool ran = run_warps(), landed = land_some();
      finish_some();
      if (ran || landed || skipped_) continue;
      if (ended()) return;
      if (state.transfers.empty()) fault("deadlock: %s", waiting().c_str());
      // Nobody can go on before a transfer lands.
      for (int n = lands_ > 0 ? 1 : 1 + draw() % 8; n > 0 && !state.transfers.empty(); --n) land_one();
    }
  }

 private:
  int warps_;
  Favours favours_;
  Landing landing_;
  double lands_, finishes_, skips_;  // probabilities, each turn: of a transfer, of a group of products; of each lane
  bool skipped_ = false;             // a lane that could have run
  std::vector<int> order_;

  void arrange() {
    double block[kMostCluster], role[32], both[kMostCluster][32];
    std::vector<double> rank(warps_);
    for (double &v : block) v = draw_unit();
    for (double &v : role) v = draw_unit();
    for (auto &of_block : both) {
      for (double &v : of_block) v = draw_unit();
    }
    for (int w = 0; w < warps_; ++w) {
      const int b = w / state.warps, group = w % state.warps / kWarpsOfGroup;
      const double shared = favours_ == Favours::kBlocks ? block[b] : favours_ == Favours::kWarpgroups ? both[b][group]
                            : favours_ == Favours::kRoles ? role[group] : 0.0;
      rank[w] = 10 * shared + draw_unit();
      order_[w] = w;
    }
    std::sort(order_.begin(), order_.end(), [&](int a, int b) { return rank[a] > rank[b]; });
  }

  // The first warp in order, or from a random one on, that can run, for some steps.
  bool run_warps() {
    const bool any = favours_ == Favours::kNobody || (state.interrupted && draw_unit() < 0.7);
    if (!any && draw_unit() < 0.002) arrange();
    const int first = any ? draw() % warps_ : 0, most = any ? 8 : 64;
    state.interrupted = false;
    for (int k = 0; k < warps_; ++k) {
      const int warp = any ? (first + k) % warps_ : order_[k];
      bool ran = false;
      for (int n = 1 + draw() % most; n > 0 && step(warp); --n) {
        ran = true;
        if (state.interrupted) break;
      }
      if (ran) return true;
    }
    return false;
  }

  // Every lane of a warp that can go on, in one of many orders.
  bool step(int warp) {
    Warp &w = state.of_warps[warp];
    if (w.idle_since == state.changes) return false;
    const int first = draw() % 32, direction = draw() % 2 ? 1 : 31;
    bool ran = false, skipped = false;
    int together = 0;
    for (int k = 0; k < 32; ++k) {
      const int index = warp * 32 + (first + k * direction) % 32;
      Fiber &f = state.fibers[index];
      if (may_go_on(f)) {
        if (skips_ > 0 && draw_unit() < skips_) {
          skipped = true;
        } else {
          resume(index);
          ran = true;
        }
      }
      together += f.waits == Waits::kLanes;
    }
    if (together == 32) {
      meet(warp);
      ran = true;
    }
    if (!ran && !skipped) w.idle_since = state.changes;
    skipped_ = skipped_ || skipped;
    return ran;
  }

  void land_one() {
    auto &all = state.transfers;
    const size_t index = landing_ == Landing::kOldest ? 0 : landing_ == Landing::kNewest ? all.size() - 1
                                                                                         : draw() % all.size();
    const Transfer transfer = all[index];
    all.erase(all.begin() + index);
    land(transfer);
  }

  bool land_some() {
    bool any = false;
    while (!state.transfers.empty() && draw_unit() < lands_) {
      for (int n = 1 + draw() % 16; n > 0 && !state.transfers.empty(); --n) land_one();
      any = true;
    }
    return any;
  }

  // Products and reads of TMA stores that nobody waits for yet. The first lane of a warp is the one that stores.
  void finish_some() {
    while (draw_unit() < finishes_) {
      const int warp = draw() % warps_;
      if (!state.of_warps[warp].product_groups.empty()) run_product_group(warp);
      Fiber &f = state.fibers[draw() % state.of_warps.size() * 32];
      if (!f.store_groups.empty()) read_store_group(f);
    }
  }

  bool ended() const {
    const auto ends = [](const Fiber &f) { return f.waits == Waits::kEnded; };
    return std::all_of(state.fibers.begin(), state.fibers.end(), ends);
  }

  std::string waiting() const {
    std::map<std::string, int> lanes;
    for (size_t i = 0; i < state.fibers.size(); ++i) {
      const Fiber &f = state.fibers[i];
      if (f.waits == Waits::kEnded) continue;
      const int b = i / state.threads;
      std::string what = "block " + std::to_string(b) + " warp " + std::to_string(i % state.threads / 32);
      if (f.waits == Waits::kBarrier) {
        const int index = barrier_index(b, f.which);
        const Barrier &barrier = state.blocks[b].barriers[index];
        what += " for phase " + std::to_string(f.phase[index]) + " of barrier " + std::to_string(index) + " (" +
                std::to_string(barrier.pending) + " arrivals and " + std::to_string(barrier.bytes) + " bytes pending)";
      } else {
        what += f.waits == Waits::kLanes ? " for its lanes" : f.waits == Waits::kCluster ? " for the cluster"
                                                                                         : " for a named barrier";
      }
      ++lanes[what];
    }
    std::string text;
    for (const auto &[what, count] : lanes) text += std::to_string(count) + " lanes of " + what + "; ";
    return text;
  }
};

}  // namespace

void run_cluster() {
  Schedule().run();
  if (!state.transfers.empty()) fault("%zu transfers have not landed at the end", state.transfers.size());
  for (const Warp &w : state.of_warps) {
    if (!w.products.empty() || !w.product_groups.empty()) fault("products have not been waited for at the end");
  }
}

}  // namespace machine
