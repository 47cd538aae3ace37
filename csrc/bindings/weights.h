#pragma once

#include <memory>

#include "engine/model.h"

namespace lowbit {

// A packed weight as Python holds it.
struct Weight {
    std::shared_ptr<const Linear> linear;
};

}  // namespace lowbit
