#include "solvers/solve.h"

#include <deque>
#include <optional>
#include <vector>

#include "solvers/feeder.h"
#include "solvers/polisher.h"

namespace lowbit {

namespace {

constexpr int kTiles = kFeedLanes / kSweepLanes;

}  // namespace

void solve(ThreadPool& pool, const SolverKernels& kernels, const Problem& problem, const Feed* feed, const Polish* polish) {
    const Shape& shape = problem.shape;
    if (shape.rows == 0) return;
    const bool refit = polish != nullptr && polish->refit, minima = refit && problem.as.offsets == Offsets::minima;
    const std::size_t of_one = static_cast<std::size_t>(kSweepLanes) * product_stride(shape), of_all = of_one * shape.groups();
    const bool keeps = refit && of_all * sizeof(float) <= polish->most_kept;

    std::optional<Second> h;
    std::optional<Feeder> feeder;
    std::optional<Polisher> polisher;
    if (feed != nullptr) feeder.emplace(kernels, problem, *feed);
    if (polish != nullptr) {
        h.emplace(problem, minima);
        polisher.emplace(kernels, problem, *polish, *h, keeps);
    }
    struct Memory {
        std::deque<FeedTile> feed;
        std::deque<PolishTile> polish;
        Buffer<float> pulled;
    };
    // A tile that is not there when nobody polishes or feeds takes no memory.
    std::vector<Memory> memory(pool.threads());
    for (Memory& own : memory) {
        if (feed != nullptr) own.feed.emplace_back(shape);
        if (polish == nullptr) continue;
        for (int i = 0; i < kTiles; ++i)
            own.polish.emplace_back(shape, *h, refit ? (minima ? 2 : 1) * shape.groups() : 0, !refit ? 0 : keeps ? of_all : of_one);
        if (feed != nullptr) own.pulled.reserve(static_cast<std::size_t>(kFeedLanes) * shape.padded());
    }
    pool.run([&](Worker& worker) {
        Memory& own = memory[worker.index()];
        worker.share(0, (shape.rows + kFeedLanes - 1) / kFeedLanes, 1, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t tile = begin; tile < end; ++tile) {
                const int first = static_cast<int>(tile) * kFeedLanes;
                float* pulled = feeder && polisher ? own.pulled.data() : nullptr;
                if (feeder) feeder->run(own.feed.front(), first, pulled, shape.padded());
                if (polisher) polisher->run(own.polish, first, pulled);
            }
        });
    });
}

}  // namespace lowbit
