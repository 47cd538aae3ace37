// How keys and values are stored: as 16-bit integers, or as codes of 1 to 8 bits with scales in float16.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowbit {

constexpr int kCacheBlock = 64;  // positions that attention reads at a time; codes, scales and offsets of as many lie together

// What finds the scale of a group.
//   absmax: the largest magnitude / reach         minmax: (highest - lowest) / (high - low), with an offset
//   norm: the root of the mean square / reach, then the scale of least squares for the levels that numbers go to with it
enum class KVFit : std::uint8_t { absmax, minmax, norm };

// x = scale * level, scale * level + offset, or scale * (level - offset)
enum class KVOffset : std::uint8_t { none, minimum, zero };

// How the keys, or the values, of one layer are stored.
//
// A level is `unit` times a whole number within a byte with a sign. Codes are counted from the lowest level. Of 8 bits they are
// the whole numbers themselves (less 128 where the lowest is 0), of up to 4 they name an entry of `levels`, else they are counted
// from `low`.
struct KVSide {
    int bits = 16;   // of a code; 16: integers with a scale in float32 for each vector, and nothing of what follows
    int group = 0;   // channels that share a scale, all of a head where 0; 1 where `tokens` share one for each channel
    int tokens = 1;  // positions that share the scales of channels: 32 or 64
    KVOffset offset = KVOffset::none;
    KVFit fit = KVFit::absmax;
    bool rotate = false;         // vectors are multiplied by a Hadamard matrix first
    bool uniform = true;         // whether levels are low, low + 1, ..., low + count - 1
    int low = 0, count = 0;
    float reach = 1;             // what the largest magnitude becomes, or with norm the root of the mean square; in levels, as bounds
    float unit = 1;
    alignas(16) std::int8_t levels[16] = {};
    float bounds[16] = {};       // the largest number that goes to each level but the last, where they are not uniform

    bool packed() const { return bits < 16; }
    bool per_channel() const { return tokens > 1; }
    int shift() const { return bits == 8 && low == 0 ? 128 : 0; }
    // Whether vectors with channels far above their others are kept in float16.
    bool guarded() const { return bits == 16 || (bits == 8 && group == 0 && offset == KVOffset::none && uniform && fit == KVFit::absmax); }
    int groups(int head_dim) const { return group > 1 ? head_dim / group : 1; }
    // Scales of a block; offsets are as many.
    int scales(int head_dim) const {
        return per_channel() ? kCacheBlock / tokens * head_dim : kCacheBlock * groups(head_dim);
    }
    // Bytes of a block of one head, and how many of them are codes; the scales follow, then the offsets.
    std::size_t code_bytes(int head_dim) const { return static_cast<std::size_t>(kCacheBlock) / 8 * head_dim * bits; }
    std::size_t packed_bytes(int head_dim) const {
        return code_bytes(head_dim) + (packed() ? std::size_t{2} * scales(head_dim) * (offset == KVOffset::none ? 1 : 2) : 0);
    }
    std::size_t block_bytes(int head_dim) const { return (packed_bytes(head_dim) + 63) / 64 * 64; }
};

// How one layer is stored. A query at position i reads the first `sinks` positions and those from `first_recent(i)` exactly, as
// 16-bit integers, and all others as they are stored.
struct KVLayer {
    KVSide keys, values;
    int sinks = 0, recent = 0;

    int tokens() const { return keys.tokens > values.tokens ? keys.tokens : values.tokens; }
    bool packed() const { return keys.packed() || values.packed(); }
    bool has_recent() const { return recent > 0 || tokens() > 1; }
    bool exact_beside() const { return has_recent() || sinks > 0; }
    int first_recent(int position) const {
        int first = position + 1 - recent;
        if (tokens() > 1 && position / tokens() * tokens() < first) first = position / tokens() * tokens();
        return first > 0 ? first : 0;
    }
};

}  // namespace lowbit
