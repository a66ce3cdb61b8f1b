// MurmurHash3 x64 128 (Austin Appleby, public domain algorithm) and the CRC-32 of PNG (ISO 3309).
// Neither is cryptographic: they find copies and accidents, not forgeries.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

namespace facefast {

struct Hash128 {
  uint64_t low = 0, high = 0;
};

namespace detail {

inline uint64_t rotate_left(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }

inline uint64_t load64(const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, 8);
  return word;  // little-endian machines only, as are DALI and CUDA
}

inline uint64_t avalanche(uint64_t k) {
  k = (k ^ (k >> 33)) * 0xff51afd7ed558ccdULL;
  k = (k ^ (k >> 33)) * 0xc4ceb9fe1a85ec53ULL;
  return k ^ (k >> 33);
}

constexpr uint64_t kC1 = 0x87c37b91114253d5ULL, kC2 = 0x4cf5ad432745937fULL;

inline uint64_t scramble_low(uint64_t k) { return rotate_left(k * kC1, 31) * kC2; }
inline uint64_t scramble_high(uint64_t k) { return rotate_left(k * kC2, 33) * kC1; }

// tables[k][b] is the CRC of byte b followed by k zero bytes, so that eight bytes go in at once.
constexpr std::array<std::array<uint32_t, 256>, 8> make_crc_tables() {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0xedb88320U : 0);
    tables[0][byte] = crc;
  }
  for (int k = 1; k < 8; ++k) {
    for (int byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[k - 1][byte];
      tables[k][byte] = (before >> 8) ^ tables[0][before & 255];
    }
  }
  return tables;
}

inline constexpr auto kCrcTables = make_crc_tables();

}  // namespace detail

inline Hash128 murmur3(const uint8_t* data, uint64_t size, uint32_t seed = 0) {
  using namespace detail;
  uint64_t low = seed, high = seed;
  const uint8_t* const tail = data + size / 16 * 16;
  for (const uint8_t* p = data; p != tail; p += 16) {
    low ^= scramble_low(load64(p));
    low = (rotate_left(low, 27) + high) * 5 + 0x52dce729;
    high ^= scramble_high(load64(p + 8));
    high = (rotate_left(high, 31) + low) * 5 + 0x38495ab5;
  }
  uint8_t rest[16] = {};
  if (size % 16 != 0) std::memcpy(rest, tail, size % 16);
  high ^= scramble_high(load64(rest + 8));
  low ^= scramble_low(load64(rest));

  low ^= size;
  high ^= size;
  low += high;
  high += low;
  low = avalanche(low);
  high = avalanche(high);
  low += high;
  high += low;
  return {low, high};
}

inline uint32_t crc32(const uint8_t* data, uint64_t size) {
  const auto& t = detail::kCrcTables;
  uint32_t crc = ~0U;
  for (; size >= 8; data += 8, size -= 8) {
    const uint64_t word = detail::load64(data) ^ crc;
    crc = t[7][word & 255] ^ t[6][word >> 8 & 255] ^ t[5][word >> 16 & 255] ^ t[4][word >> 24 & 255] ^
          t[3][word >> 32 & 255] ^ t[2][word >> 40 & 255] ^ t[1][word >> 48 & 255] ^ t[0][word >> 56];
  }
  for (; size > 0; ++data, --size) crc = (crc >> 8) ^ t[0][(crc ^ *data) & 255];
  return ~crc;
}

}  // namespace facefast
