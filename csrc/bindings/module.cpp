#include "bindings/bindings.h"

NB_MODULE(_core, m) {
    m.doc() = "Products with packed weights, in C++.";
    m.attr("version") = LOWBIT_VERSION;
    lowbit::bind_features(m);
    lowbit::bind_weights(m);
    lowbit::bind_model(m);
    lowbit::bind_kv_cache(m);
    lowbit::bind_decoder(m);
    lowbit::bind_limits(m);
    lowbit::bind_solvers(m);
    lowbit::bind_moments(m);
    lowbit::bind_causal(m);
    lowbit::bind_fits(m);
}
