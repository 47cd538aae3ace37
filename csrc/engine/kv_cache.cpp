#include "engine/kv_cache.h"

#include <string>

namespace lowbit {

namespace {

void require(bool right, const char* why) {
    if (!right) throw std::invalid_argument(why);
}

void check_side(const KVSide& s, int head_dim) {
    constexpr int kWidestRotation = 512;
    require(!s.rotate || ((head_dim & (head_dim - 1)) == 0 && head_dim >= kTile && head_dim <= kWidestRotation),
            "rotated heads are of a power of two from 16 to 512 channels");
    if (!s.packed()) {
        require(s.bits == 16, "a code has 1 to 8 bits, or 16");
        return;
    }
    require(s.bits >= 1 && s.bits <= 8, "a code has 1 to 8 bits, or 16");
    require(s.tokens == 1 || s.tokens == 32 || s.tokens == 64, "1, 32 or 64 tokens share scales");
    require(s.tokens == 1 ? s.group == 0 || (s.group >= kTile && s.group % kTile == 0 && head_dim % s.group == 0) : s.group == 1,
            "a group is of whole sixteens of channels and divides a head; it is 1 where tokens share scales");
    require(s.count >= 2 && s.count <= 1 << s.bits, "as many levels as there are codes");
    require(s.uniform || s.bits <= 4, "a table of levels has at most 16");
    require(s.bits <= 4 || (s.low >= -128 && s.low + s.count - 1 <= (s.shift() ? 255 : 127)), "levels are whole numbers of a byte");
    require((s.offset == KVOffset::none) == (s.fit != KVFit::minmax), "minmax finds an offset, and the other fits none");
    require(s.offset == KVOffset::none || (s.uniform && s.unit == 1), "an offset belongs to levels that are whole numbers one after another");
    require(s.reach > 0 && s.unit > 0, "reach and unit are positive");
    require(s.uniform ? s.unit == 1 : true, "whole levels have the unit 1");
}

}  // namespace

void check(const KVLayer& layer, int head_dim) {
    check_side(layer.keys, head_dim);
    check_side(layer.values, head_dim);
    constexpr int kMost = 1 << 20;
    require(layer.sinks >= 0 && layer.sinks <= kMost && layer.recent >= 0 && layer.recent <= kMost, "sinks and recent are from 0 to 2^20");
}

}  // namespace lowbit
