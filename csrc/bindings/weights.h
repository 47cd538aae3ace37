#pragma once

#include <memory>

#include "engine/model.h"

namespace lowbit {

// A packed weight as Python holds it.
struct Weight {
    std::shared_ptr<const Linear> linear;
};

// Whether one weight can be added to another: rows of activations are rounded once for both.
inline bool fits(const Linear& weight, const Linear& rest) {
    return rest.rows == weight.rows && rest.cols == weight.cols && rest.padded_cols == weight.padded_cols &&
           rest.segment == weight.segment && rest.zero == weight.zero && !weight.paired && !rest.paired;
}

}  // namespace lowbit
