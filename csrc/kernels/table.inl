// The table of this instruction set; included last.
namespace lowbit {
namespace {
constexpr Kernels table_of(const char* name) {
    return {name, quantize, linear, rms_norm, gate, rotate, attend, append, unpack_row, peak, read};
}
}  // namespace
}  // namespace lowbit
