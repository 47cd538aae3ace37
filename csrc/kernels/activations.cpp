#include "kernels/activations.h"

namespace lowbit {

void ActivationsBuffer::shape(const PackedWeight& weight, int digits, int count) {
    rows.count = count;
    rows.digits = digits;
    rows.padded_cols = weight.padded_cols;
    rows.zero = weight.zero > 0 ? weight.zero : 1;
    rows.segment = weight.segment;
    rows.segments = weight.segment > 0 ? weight.padded_cols / weight.segment : 0;
    const std::size_t segments = static_cast<std::size_t>(count) * rows.segments;
    for (int digit = 0; digit < digits; ++digit) {
        q[digit].reserve(static_cast<std::size_t>(count) * weight.padded_cols);
        start[digit].reserve(segments);
        rows.q[digit] = q[digit].data();
        rows.start[digit] = start[digit].data();
        if (digits == 1) continue;
        remainder[digit].reserve(static_cast<std::size_t>(count) * weight.padded_cols);
        remainder_start[digit].reserve(segments);
        rows.remainder[digit] = remainder[digit].data();
        rows.remainder_start[digit] = remainder_start[digit].data();
    }
    scale.reserve(segments);
    total.reserve(segments);
    rows.scale = scale.data();
    rows.total = total.data();
    if (digits == 1) return;
    remainder_scale.reserve(segments);
    has_remainder.reserve(count);
    rows.remainder_scale = remainder_scale.data();
    rows.has_remainder = has_remainder.data();
}

}  // namespace lowbit
