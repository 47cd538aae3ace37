// Keys and values of several sequences. Memory is reserved for all positions and taken as they are reached.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core/buffer.h"
#include "kernels/kernels.h"

namespace lowbit {

// std::invalid_argument where the kernels do not compute it for heads of this width.
void check(const KVLayer& layer, int head_dim);

// What positions of one layer are stored as, and beside that those that some queries read exactly: the first ones, and the newest
// in a ring. Of both there is a store in 16 bits, in which the first `sinks` positions lie in whole blocks, and the ring after them.
class KVCache {
 public:
    static constexpr int kPiece = 256;  // tokens of a sequence that a forward may have, where a layer has a ring

    // layers: one for each of the model.
    KVCache(std::vector<KVLayer> layers, int key_heads, int head_dim, int sequences, int capacity)
        : layers_(std::move(layers)), key_heads_(key_heads), head_dim_(head_dim), sequences_(sequences) {
        if (sequences < 1 || capacity < 1) throw std::invalid_argument("a cache of no sequences or positions");
        capacity_ = whole_blocks(capacity);
        heads_ = static_cast<std::size_t>(key_heads_) * sequences_;
        const auto side = [&](const KVSide& s, int positions) {
            const std::size_t stride = s.packed() ? s.block_bytes(head_dim_) * (positions / kCacheBlock)
                                                  : static_cast<std::size_t>(positions) * head_dim_ * 2;
            const Store store{bytes_, stride, scales_count_, positions, s.packed() && s.guarded() ? halves_bytes_ : 0};
            bytes_ += stride * heads_;
            if (!s.packed()) scales_count_ += heads_ * positions;
            if (s.packed() && s.guarded()) halves_bytes_ += heads_ * positions * head_dim_ * 2;
            return store;
        };
        const KVSide exact;
        for (const KVLayer& layer : layers_) {
            Stores stores{side(layer.keys, capacity_), side(layer.values, capacity_), {}, {}, 0, 0};
            if (layer.exact_beside()) {
                stores.sinks = whole_blocks(std::min(layer.sinks, capacity_));
                const std::int64_t newest = std::int64_t{kPiece} + std::max(layer.recent, layer.tokens());
                stores.ring = layer.has_recent() ? whole_blocks(static_cast<int>(std::min<std::int64_t>(newest, capacity_))) : 0;
                stores.exact_keys = side(exact, stores.sinks + stores.ring);
                stores.exact_values = side(exact, stores.sinks + stores.ring);
                exact_bytes_ += std::int64_t{2} * key_heads_ * (stores.sinks + stores.ring) * (2 * head_dim_ + 4);
            }
            stores_.push_back(stores);
            ring_ = std::max(ring_, layer.has_recent() ? 1 : 0);
        }
        data_ = Buffer<std::uint8_t>(bytes_);
        scales_ = Buffer<float>(scales_count_);
        newest_.assign(sequences_, 0);
    }

    // All positions as they are stored.
    KeyValues at(int layer, int sequence, int key_head) {
        const Stores& stores = stores_[layer];
        const KVLayer& how = layers_[layer];
        return {side(stores.keys, how.keys, sequence, key_head), side(stores.values, how.values, sequence, key_head)};
    }

    // Those that are kept exactly beside it.
    KeyValues exact_at(int layer, int sequence, int key_head) {
        const Stores& stores = stores_[layer];
        return {side(stores.exact_keys, KVSide{}, sequence, key_head), side(stores.exact_values, KVSide{}, sequence, key_head)};
    }
    // Positions of the store of exact ones before its ring, and in it.
    int sinks(int layer) const { return stores_[layer].sinks; }
    int ring(int layer) const { return stores_[layer].ring; }
    int ring_at(int layer, int position) const { return stores_[layer].sinks + position % stores_[layer].ring; }

    // Memory for the float16 of sides in int8: reserved for all positions at once, and taken, as all else here, where it is
    // written. False where the system gives none.
    bool add_halves() {
        const std::lock_guard one(adding_);
        if (halves_.load(std::memory_order_relaxed) != nullptr) return true;
        try {
            float16_ = Buffer<std::uint8_t>(halves_bytes_);
        } catch (const std::bad_alloc&) {
            return false;
        }
        halves_.store(float16_.data(), std::memory_order_release);
        return true;
    }

    // Whether positions from `first` can be written: what their queries read exactly has not left a ring.
    bool can_go_on(int sequence, int first) const {
        if (first == 0) return true;
        for (std::size_t i = 0; i < layers_.size(); ++i) {
            if (!layers_[i].has_recent() || stores_[i].ring >= capacity_) continue;
            if (layers_[i].tokens() == 1 && first <= layers_[i].sinks) continue;
            if (layers_[i].first_recent(first) < newest_[sequence] - stores_[i].ring) return false;
        }
        return true;
    }
    // Positions [first, end) of a sequence are about to be written.
    void note(int sequence, int first, int end) {
        newest_[sequence] = first == 0 ? end : std::max(newest_[sequence], end);
    }

    int sequences() const { return sequences_; }
    int capacity() const { return capacity_; }
    const KVLayer& layer(int index) const { return layers_[index]; }
    int layers() const { return static_cast<int>(layers_.size()); }
    // Whether a forward takes no more than `kPiece` tokens of a sequence.
    bool in_pieces() const { return ring_ > 0; }
    // Bytes of one position of one sequence, as it is stored.
    std::int64_t bytes_per_position() const {
        std::int64_t total = 0;
        for (const KVLayer& layer : layers_) {
            for (const KVSide* s : {&layer.keys, &layer.values})
                total += s->packed() ? static_cast<std::int64_t>(s->packed_bytes(head_dim_)) : kCacheBlock * (2 * head_dim_ + 4);
        }
        return (total * key_heads_ + kCacheBlock - 1) / kCacheBlock;
    }
    // Bytes of what one sequence keeps exactly beside it.
    std::int64_t exact_bytes() const { return exact_bytes_; }

 private:
    // Where one side of a layer begins, by bytes and by scales, and how much of it one head has.
    struct Store {
        std::size_t begin = 0, stride = 0, scales = 0;
        int positions = 0;
        std::size_t halves = 0;
    };
    struct Stores {
        Store keys, values, exact_keys, exact_values;
        int sinks = 0, ring = 0;
    };

    static int whole_blocks(int positions) { return (positions + kCacheBlock - 1) / kCacheBlock * kCacheBlock; }

    CachedSide side(const Store& store, const KVSide& how, int sequence, int key_head) {
        const std::size_t index = static_cast<std::size_t>(sequence) * key_heads_ + key_head;
        std::uint8_t* data = data_.data() + store.begin + index * store.stride;
        if (!how.packed()) return {data, data, scales_.data() + store.scales + index * store.positions};
        std::uint8_t* halves = how.guarded() ? halves_.load(std::memory_order_acquire) : nullptr;
        if (halves != nullptr) halves += store.halves + index * store.positions * head_dim_ * 2;
        return {data, halves, nullptr};
    }

    std::vector<KVLayer> layers_;
    std::vector<Stores> stores_;
    int key_heads_, head_dim_, sequences_, capacity_ = 0, ring_ = 0;
    std::size_t heads_ = 0, bytes_ = 0, scales_count_ = 0, halves_bytes_ = 0;
    std::int64_t exact_bytes_ = 0;
    Buffer<std::uint8_t> data_, float16_;
    std::atomic<std::uint8_t*> halves_{nullptr};
    std::mutex adding_;
    Buffer<float> scales_;
    std::vector<int> newest_;  // of each sequence, the end of what has been written since its first position was
};

}  // namespace lowbit
