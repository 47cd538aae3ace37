// One function a topic, each in a file of its own, called from module.cpp.
#pragma once

#include <nanobind/nanobind.h>

namespace lowbit {

namespace nb = nanobind;

void bind_features(nb::module_ &m);
void bind_weights(nb::module_ &m);
void bind_model(nb::module_ &m);
void bind_decoder(nb::module_ &m);
void bind_limits(nb::module_ &m);
void bind_solvers(nb::module_ &m);
void bind_moments(nb::module_ &m);
void bind_causal(nb::module_ &m);
void bind_fits(nb::module_ &m);
void bind_kv_cache(nb::module_ &m);

} // namespace lowbit
