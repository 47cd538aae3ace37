#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace lowbit {

namespace {

struct Candidate {
    float logit;
    std::int32_t token;
    // The likelier first, and of equal ones the first: so the order is always the same.
    bool operator<(const Candidate& other) const {
        return logit > other.logit || (logit == other.logit && token < other.token);
    }
};

constexpr double kLargest = std::numeric_limits<float>::max();

std::int32_t likeliest(const float* logits, int vocabulary) {
    std::int32_t best = 0;
    for (std::int32_t i = 1; i < vocabulary; ++i)
        if (logits[i] > logits[best]) best = i;
    return best;
}

}  // namespace

std::int32_t sample(float* logits, int vocabulary, const Sampling& how, const std::uint8_t* seen, Random& random) {
    // Sorting needs numbers that can be compared; a token whose logit is none is never the likeliest.
    for (int i = 0; i < vocabulary; ++i)
        if (std::isnan(logits[i])) logits[i] = -std::numeric_limits<float>::infinity();
    if (seen != nullptr && how.repetition_penalty != 1) {
        for (int i = 0; i < vocabulary; ++i) {
            if (!seen[i]) continue;
            const double changed = logits[i] > 0 ? logits[i] / how.repetition_penalty : logits[i] * how.repetition_penalty;
            logits[i] = static_cast<float>(std::clamp<double>(changed, -kLargest, kLargest));
        }
    }
    const std::int32_t best = likeliest(logits, vocabulary);
    if (how.temperature <= 0) return best;

    const double highest = logits[best], inverse = 1.0 / how.temperature;
    // The likeliest apart: of two infinite logits there is no difference.
    const auto weight = [&](float logit) { return logit == logits[best] ? 1.0 : std::exp((logit - highest) * inverse); };
    std::vector<Candidate> candidates;
    candidates.reserve(vocabulary);
    for (std::int32_t i = 0; i < vocabulary; ++i) candidates.push_back({logits[i], i});
    const std::size_t kept = how.top_k > 0 ? std::min(candidates.size(), static_cast<std::size_t>(how.top_k)) : candidates.size();
    if (kept < candidates.size()) {
        std::nth_element(candidates.begin(), candidates.begin() + kept, candidates.end());
        candidates.resize(kept);
    }
    if (how.top_p < 1) {
        double total = 0, sum = 0;
        for (const Candidate& c : candidates) total += weight(c.logit);
        // Sorted in steps: the nucleus is nearly always small.
        std::size_t sorted = 0, taken = 0;
        while (taken < candidates.size() && (taken == 0 || sum < how.top_p * total)) {
            if (taken == sorted) {
                sorted = std::min(candidates.size(), std::max<std::size_t>(64, 4 * sorted));
                std::partial_sort(candidates.begin() + taken, candidates.begin() + sorted, candidates.end());
            }
            sum += weight(candidates[taken++].logit);
        }
        candidates.resize(taken);
    }
    std::erase_if(candidates, [&](const Candidate& c) { return weight(c.logit) < how.min_p; });
    std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
    double total = 0;
    for (const Candidate& c : candidates) total += weight(c.logit);
    double left = random.uniform() * total;
    for (const Candidate& c : candidates) {
        left -= weight(c.logit);
        if (left < 0) return c.token;
    }
    return candidates.back().token;
}

}  // namespace lowbit
