#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "core/thread_pool.h"

namespace lowbit {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

nb::dict limits(ThreadPool& pool, const std::string& isa, std::int64_t bytes, int repeats) {
    const Kernels& kernels = checked_kernels(isa);
    require(bytes >= 1 << 20 && repeats >= 1, "at least a megabyte to read, and one repeat");
    double best_read = 0, best_products = 0;
    {
        const nb::gil_scoped_release released;
        Buffer<std::uint8_t> memory(static_cast<std::size_t>(bytes));
        // Pages that nobody wrote to are one and the same. Zeros, because reading adds up what it reads.
        std::memset(memory.data(), 0, memory.size());
        const std::int64_t share = bytes / pool.threads();
        std::atomic<std::int64_t> sink{0}, products{0};
        for (int i = 0; i < repeats; ++i) {
            pool.run([](Worker&) {});  // so that nobody sleeps when the clock starts
            auto start = Clock::now();
            pool.run([&](Worker& worker) { sink += kernels.read(memory.data() + worker.index() * share, share); });
            best_read = std::max(best_read, static_cast<double>(share * pool.threads()) / seconds_since(start));
            products = 0;
            start = Clock::now();
            pool.run([&](Worker&) { products += kernels.peak(4000000); });
            best_products = std::max(best_products, static_cast<double>(products) / seconds_since(start));
        }
    }
    nb::dict found;
    found["read_bytes_per_second"] = best_read;
    found["int8_products_per_second"] = best_products;
    return found;
}

}  // namespace

void bind_limits(nb::module_& m) {
    m.def("limits", &limits, nb::arg("pool"), nb::arg("isa") = "", nb::arg("bytes") = std::int64_t{256} << 20,
          nb::arg("repeats") = 3,
          "The best that this processor does here: 'read_bytes_per_second' of memory too large for caches, and "
          "'int8_products_per_second' of dot products that wait for nothing.");
}

}  // namespace lowbit
