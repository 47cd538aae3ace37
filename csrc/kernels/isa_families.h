// For files that go through isas.def: LOWBIT_ON_FAMILY(...) keeps what stands in a line for a family of processors that this
// one belongs to, and leaves out the rest.
#pragma once

#define LOWBIT_ON_any(...) __VA_ARGS__
#ifdef LOWBIT_X86
#define LOWBIT_ON_x86(...) __VA_ARGS__
#else
#define LOWBIT_ON_x86(...)
#endif
