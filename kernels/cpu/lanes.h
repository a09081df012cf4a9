// Registers of numbers, the same for every tier: the compiler's own vectors (GCC and Clang), and what they lack.
//
// Each tier is a library of its own. Were they one, the linker would keep a single copy of what they share of the standard
// library, and a processor might meet instructions that it does not have.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include DIFFPRESS_TIER_HEADER

// What the library offers.
#define SHOWN __attribute__((visibility("default")))

namespace diffpress::DIFFPRESS_TIER {

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Integers = int32_t __attribute__((vector_size(4 * kLanes)));
using Unsigned = uint32_t __attribute__((vector_size(4 * kLanes)));

// Registers of outputs that are computed together, and the outputs in them.
constexpr int64_t kRegisters = 2;
constexpr int64_t kPanel = kRegisters * kLanes;

enum Type : int64_t { kInt8, kFloat32, kBfloat16, kFloat16 };

template <class Target, class Source>
Target same_bits(Source source) {
  static_assert(sizeof(Target) == sizeof(Source));
  Target target;
  std::memcpy(&target, &source, sizeof(target));
  return target;
}

template <class Vector>
Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <class Vector>
void store(void* to, Vector vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

// Less nothing, as compilers know that this is the value; with nothing added it might be another 0.
inline Floats all(float value) { return value - Floats{}; }
inline Integers all(int32_t value) { return Integers{} + value; }
inline Floats to_floats(Integers value) { return __builtin_convertvector(value, Floats); }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats magnitude(Floats a) { return same_bits<Floats>(same_bits<Unsigned>(a) & 0x7FFFFFFFu); }

// Half to even, as long as |value| <= 2^22: what is added leaves no room for a fraction.
inline Floats rounded(Floats value) { return (value + 12582912.0f) - 12582912.0f; }
inline Integers to_integers(Floats whole) { return __builtin_convertvector(whole, Integers); }

// All bits of the first `count` lanes.
inline Integers lanes_before(int64_t count) {
  Integers number{};
  for (int32_t i = 0; i < kLanes; ++i) number[i] = i;
  return number < static_cast<int32_t>(std::clamp<int64_t>(count, 0, kLanes));
}

inline float largest(Floats value) {
  float found = value[0];
  for (int64_t i = 1; i < kLanes; ++i) found = std::max(found, value[i]);
  return found;
}

template <class Number, class Vector>
Number sum_of(Vector value) {
  Number found = 0;
  for (int64_t i = 0; i < kLanes; ++i) found += value[i];
  return found;
}

// The first `count` numbers of four bytes, and zeros.
template <class Vector>
Vector load_first(const void* from, int64_t count) {
  if (count >= kLanes) return load<Vector>(from);
  Vector vector{};
  if (count > 0) std::memcpy(&vector, from, static_cast<size_t>(count * 4));
  return vector;
}

inline Floats from_bits(const uint16_t* from, int64_t type) {
  if (type == kFloat16) return from_half(from);
  return same_bits<Floats>((Unsigned)widened(from) << 16);
}

// Numbers `at` and after of an array of floats of any type; behind `count` of them zeros.
inline Floats load_floats(const void* from, int64_t type, int64_t at, int64_t count) {
  if (type == kFloat32) return load_first<Floats>(static_cast<const float*>(from) + at, count);
  const uint16_t* bits = static_cast<const uint16_t*>(from) + at;
  if (count >= kLanes) return from_bits(bits, type);
  if (count <= 0) return Floats{};
  uint16_t first[kLanes] = {};
  std::memcpy(first, bits, static_cast<size_t>(count * 2));
  return from_bits(first, type);
}

// Rounded half to even.
inline void to_bfloat16(Floats value, uint16_t* to) {
  const Unsigned bits = same_bits<Unsigned>(value);
  const Unsigned near = (bits + ((bits >> 16) & 1u) + 0x7FFFu) >> 16;
  store_low_halves((Register)(value == value ? near : Unsigned{} + 0x7FC0u), to);
}

inline void to_bits(Floats value, int64_t type, uint16_t* to) {
  if (type == kFloat16) to_half(value, to);
  else to_bfloat16(value, to);
}

inline void store_floats(void* to, int64_t type, int64_t at, int64_t count, Floats value) {
  if (type == kFloat32) {
    float* target = static_cast<float*>(to) + at;
    if (count >= kLanes) store(target, value);
    else std::memcpy(target, &value, static_cast<size_t>(count * 4));
    return;
  }
  uint16_t* target = static_cast<uint16_t*>(to) + at;
  if (count >= kLanes) return to_bits(value, type, target);
  uint16_t first[kLanes];
  to_bits(value, type, first);
  std::memcpy(target, first, static_cast<size_t>(count * 2));
}

inline void store_bytes(void* to, int64_t count, Integers value) {
  if (count >= kLanes) return store_low_bytes((Register)value, to);
  uint8_t bytes[kLanes];
  store_low_bytes((Register)value, bytes);
  std::memcpy(to, bytes, static_cast<size_t>(count));
}

}  // namespace diffpress::DIFFPRESS_TIER
