#include "core/features.h"

#include <algorithm>
#include <cstdint>
#include <thread>

#if defined(__x86_64__) || defined(_M_X64)
#define LOWBIT_CPUID 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sched.h>
#include <unistd.h>
#endif

namespace lowbit {
namespace {

#if LOWBIT_CPUID

struct Registers {
    std::uint32_t a = 0, b = 0, c = 0, d = 0;
};

// Zeros for a leaf that the processor does not have.
Registers cpuid(std::uint32_t leaf, std::uint32_t sub = 0) {
    Registers r;
#if defined(_MSC_VER)
    int top[4], found[4];
    __cpuid(top, static_cast<int>(leaf & 0x80000000u));
    if (static_cast<std::uint32_t>(top[0]) < leaf) return r;
    __cpuidex(found, static_cast<int>(leaf), static_cast<int>(sub));
    r = {static_cast<std::uint32_t>(found[0]), static_cast<std::uint32_t>(found[1]),
         static_cast<std::uint32_t>(found[2]), static_cast<std::uint32_t>(found[3])};
#else
    __get_cpuid_count(leaf, sub, &r.a, &r.b, &r.c, &r.d);
#endif
    return r;
}

// Which register files the system saves at a task switch (XCR0).
std::uint64_t saved_state() {
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    std::uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<std::uint64_t>(high) << 32) | low;
#endif
}

bool bit(std::uint32_t word, int at) { return (word >> at) & 1u; }

std::vector<Flag> find_flags() {
    const Registers one = cpuid(1), seven = cpuid(7), more = cpuid(7, 1);
    const std::uint64_t state = bit(one.c, 27) ? saved_state() : 0; // OSXSAVE
    const auto saves = [&](std::uint64_t mask) { return (state & mask) == mask; };
    const bool ymm = saves(0x6), zmm = saves(0xe6), tiles = saves(0x60000);
    return {
        {"avx2", ymm && bit(seven.b, 5)},
        {"fma", ymm && bit(one.c, 12)},
        {"f16c", ymm && bit(one.c, 29)},
        {"avx_vnni", ymm && bit(more.a, 4)},
        {"avx512f", zmm && bit(seven.b, 16)},
        {"avx512bw", zmm && bit(seven.b, 30)},
        {"avx512vl", zmm && bit(seven.b, 31)},
        {"avx512dq", zmm && bit(seven.b, 17)},
        {"avx512_vnni", zmm && bit(seven.c, 11)},
        {"avx512_bf16", zmm && bit(more.a, 5)},
        {"amx_tile", tiles && bit(seven.d, 24)},
        {"amx_int8", tiles && bit(seven.d, 25)},
        {"amx_bf16", tiles && bit(seven.d, 22)},
    };
}

// Intel's leaf 4 and AMD's 0x8000001d describe caches in one format; a processor has one of them.
void find_caches(Features &f) {
    for (const std::uint32_t leaf : {0x4u, 0x8000001du}) {
        for (std::uint32_t i = 0; i < 16; ++i) {
            const Registers r = cpuid(leaf, i);
            const std::uint32_t type = r.a & 0x1f, level = (r.a >> 5) & 0x7;
            if (type == 0) break;
            if (type == 2) continue; // instructions
            const std::size_t bytes = static_cast<std::size_t>((r.b >> 22) + 1) * (((r.b >> 12) & 0x3ff) + 1) *
                                      ((r.b & 0xfff) + 1) * (static_cast<std::size_t>(r.c) + 1);
            std::size_t &slot = level == 1 ? f.l1d : level == 2 ? f.l2 : f.l3;
            if (level <= 3 && slot == 0) slot = bytes;
        }
    }
}

#else

std::vector<Flag> find_flags() { return {}; }

#if defined(__APPLE__)
std::size_t asked(const char *key) {
    std::uint64_t value = 0;
    std::size_t size = sizeof value;
    return sysctlbyname(key, &value, &size, nullptr, 0) == 0 ? static_cast<std::size_t>(value) : 0;
}
void find_caches(Features &f) {
    f.l1d = asked("hw.l1dcachesize");
    f.l2 = asked("hw.l2cachesize");
    f.l3 = asked("hw.l3cachesize");
}
#elif defined(_SC_LEVEL1_DCACHE_SIZE)
std::size_t asked(int key) { return static_cast<std::size_t>(std::max(0L, sysconf(key))); }
void find_caches(Features &f) {
    f.l1d = asked(_SC_LEVEL1_DCACHE_SIZE);
    f.l2 = asked(_SC_LEVEL2_CACHE_SIZE);
    f.l3 = asked(_SC_LEVEL3_CACHE_SIZE);
}
#else
void find_caches(Features &) {}
#endif

#endif

unsigned find_cores() {
#if defined(__linux__)
    cpu_set_t set; // more than 1024 processors: the call fails, and the count of all serves
    if (sched_getaffinity(0, sizeof set, &set) == 0) return static_cast<unsigned>(std::max(1, CPU_COUNT(&set)));
#endif
    return std::max(1u, std::thread::hardware_concurrency());
}

Features find() {
    Features f;
    f.flags = find_flags();
    find_caches(f);
    f.cores = find_cores();
    return f;
}

} // namespace

bool Features::has(std::string_view wanted) const {
    return std::any_of(flags.begin(), flags.end(), [&](const Flag &f) { return f.name == wanted && f.usable; });
}

const Features &features() {
    static const Features found = find();
    return found;
}

} // namespace lowbit
