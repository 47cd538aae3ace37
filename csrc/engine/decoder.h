// Runs a model over tokens: a decode step of several sequences, or a chunk of a prompt, all layers in one go.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "core/thread_pool.h"
#include "engine/kv_cache.h"
#include "engine/model.h"
#include "kernels/kernels.h"

namespace lowbit {

// What a forward is called with. Tokens of one sequence stand together, in the order of their positions, and their
// positions follow what the cache holds of that sequence.
struct Tokens {
    int count = 0;
    const std::int32_t* ids = nullptr;
    const std::int32_t* sequence = nullptr;
    const std::int32_t* position = nullptr;
    const std::int32_t* wanted = nullptr;  // indices of the tokens whose logits are wanted
    int wanted_count = 0;
};

// Columns of padded results: whole tiles, so that rows begin at cache lines.
constexpr int padded(int width) { return (width + kTile - 1) / kTile * kTile; }

class Decoder {
 public:
    Decoder(std::shared_ptr<const ModelSpec> model, std::vector<RopeSpec> ropes, std::shared_ptr<ThreadPool> pool,
            const Kernels& kernels);

    // Logits [wanted_count, vocabulary]. The caller has checked ids, sequences and positions. interrupted: asked again and
    // again by the thread that called, while more than one token is run; once it says so nothing more is computed, and the
    // result is false: logits, and keys and values at the positions of these tokens, are then worth nothing. All else is as before.
    // std::bad_alloc where there is no memory, with the same consequences.
    bool forward(const Tokens& tokens, KVCache& cache, float* logits, const std::function<bool()>& interrupted);

    const ModelSpec& model() const { return *model_; }

 private:
    // Positions of one split of keys and values: attention is always joined from splits that begin at multiples of this.
    static constexpr int kSplit = 512;

    struct QueryBlock {  // queries that are attended together
        int token, count;
    };

    // Which experts the rows of a span take. A slot is a row and one of its `top_k` experts.
    struct Routing {
        Buffer<float> logits;       // [rows, experts], then probabilities
        Buffer<int> chosen;         // [rows, top_k]
        Buffer<float> share;        // [rows, top_k]
        Buffer<int> slots, begin;   // by expert; those of expert e from begin[e] to begin[e + 1]
        Buffer<float> results;      // [rows of one expert, width]
    };

    // What the rows of a span need between two projections.
    struct Scratch {
        std::vector<ActivationsBuffer> activations;  // one for each way in which a projection rounds its input
        Buffer<float> mlp, added, normed;
        Routing routing;
        Buffer<float> split_out, split_max, split_sum;
    };

    // What a thread needs for itself.
    struct PerThread {
        Buffer<float> row, queries, scores, extremes;
        std::vector<ActivationsBuffer> activations;
        std::vector<int> first, last;
        Scratch scratch;
    };

    // Tokens that go through a layer together: all tokens with all threads, or some tokens with one thread.
    struct Span {
        Worker& worker;
        Scratch& scratch;
        int first, count;  // tokens
        int first_block, blocks;
    };

    // Row `i` of a span, in `scratch` or where it lies.
    struct RowSource {
        template <class Row>
        RowSource(const Row& row)
            : self(&row), get([](const void* r, int i, float* scratch) -> const float* {
                  return (*static_cast<const Row*>(r))(i, scratch);
              }) {}
        const void* self;
        const float* (*get)(const void*, int, float*);
    };

    void prepare(int count, int wanted, int longest);
    void divide_into_spans(int count);
    void run(Worker& worker, const Tokens& tokens, KVCache& cache, float* logits);
    void check_interrupt(Worker& worker);
    void embed(Worker& worker, const Tokens& tokens);
    void before_attention(const Span& span, int index, const Tokens& tokens, KVCache& cache);
    void attention_and_after(const Span& span, int index, const Tokens& tokens, KVCache& cache);
    void read_head(Worker& worker, const Tokens& tokens, float* logits);
    void project(const Span& span, const ProjectionSpec& projection, const RowSource& row, float* y, std::int64_t stride, Gate gate,
                  const float* addend, const ProjectionSpec* next);
    void run_mlp(const Span& span, const MlpSpec& mlp, const RowSource& row, float* y, const float* addend,
                 const ProjectionSpec* next);
    void route(const Span& span, const ExpertsSpec& mixture, const RowSource& row);
    void run_experts(const Span& span, const ExpertsSpec& mixture, const RowSource& row, const ProjectionSpec* next);
    void norm_together(const Span& span, const LayerSpec& layer);
    void rotate_and_append(const Span& span, int index, const Tokens& tokens, KVCache& cache);
    void attend(const Span& span, int index, const Tokens& tokens, KVCache& cache);
    void attend_split(const QueryBlock& block, int key_head, int split, int index, const Tokens& tokens, KVCache& cache,
                      PerThread& own, float* out, float* maximum, float* sum);
    void complete_groups(Worker& worker, int index, const Tokens& tokens, KVCache& cache);
    AttentionShape shape_of(int index, const KVSide& keys, const KVSide& values) const;
    const float* attended(const Span& span, int row, bool rotated, float* out) const;
    const float* normed(const Buffer<float>& norm, std::int64_t row, float* out) const;
    void add_normed(const Span& span, const Buffer<float>& norm);
    void rotate(const RopeSpec& rope, const float* angles, float* head) const;

    std::shared_ptr<const ModelSpec> model_;
    const std::vector<RopeSpec> ropes_;
    std::shared_ptr<ThreadPool> pool_;
    const Kernels& kernels_;
    int qkv_stride_ = 0, hidden_ = 0, mlp_stride_ = 0, query_rows_ = 0;
    int experts_ = 0, top_k_ = 0;  // the most that a layer has

    // Of the forward at hand.
    std::vector<QueryBlock> query_blocks_;
    const std::function<bool()>* interrupted_ = nullptr;
    bool stopped_ = false;  // of the thread that called
    std::atomic<bool> no_memory_{false};  // for keys and values that int8 does not hold
    int splits_ = 1;  // that tasks of their own attend to; 1: a task takes all that its queries see
    Buffer<float> x_, qkv_;
    std::vector<Buffer<float>> angles_;  // [tokens, rotary]: cosines, sines
    struct SpanRange {
        int first, count, first_block, blocks;
    };
    std::vector<SpanRange> spans_;  // that one thread takes by itself; none: all threads take all tokens
    Scratch shared_;
    std::vector<PerThread> threads_;
};

}  // namespace lowbit
