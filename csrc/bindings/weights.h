#pragma once

#include <memory>

#include "kernels/packed_weight.h"

namespace lowbit {

// A packed weight as Python holds it.
struct Weight {
    std::shared_ptr<const PackedWeight> packed;
};

}  // namespace lowbit
