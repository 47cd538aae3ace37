#include <cstring>

#include "core/features.h"
#include "kernels/linear.h"

namespace lowbit {

extern const Kernels kernels_portable;
#ifdef LOWBIT_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512vnni;
#endif

namespace {

const Kernels* table(Isa isa) {
    switch (isa) {
#ifdef LOWBIT_X86
        case Isa::avx512vnni:
            return &kernels_avx512vnni;
        case Isa::avx512:
            return &kernels_avx512;
        case Isa::avx2:
            return &kernels_avx2;
#endif
        default:
            return &kernels_portable;
    }
}

}  // namespace

const Kernels* kernels_for(std::string_view isa) {
    for (const Isa known : supported())
        if (isa.empty() || isa == name(known)) return table(known);
    return nullptr;
}

}  // namespace lowbit
