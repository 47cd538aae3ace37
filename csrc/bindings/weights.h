#pragma once

#include <memory>

#include "kernels/linear.h"

namespace lowbit {

// A packed weight as Python holds it.
struct Weight {
    std::shared_ptr<const Linear> linear;
};

}  // namespace lowbit
