// Bounds-checked reading for the format parsers of this folder, and the TIFF directory that EXIF,
// TIFF, PNG and WebP share.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "picture.h"

namespace facefast {

struct Bytes {
  const uint8_t* data;
  size_t size;

  // To be asked before `part` and the numbers below, which do not check. No sum here can wrap.
  bool has(size_t at, size_t count) const { return at <= size && count <= size - at; }
  bool matches(size_t at, const char* text, size_t count) const {
    return has(at, count) && std::memcmp(data + at, text, count) == 0;
  }
  Bytes part(size_t at, size_t count) const { return {data + at, count}; }

  uint32_t big16(size_t at) const { return data[at] << 8 | data[at + 1]; }
  uint32_t big32(size_t at) const { return big16(at) << 16 | big16(at + 2); }
  uint32_t little16(size_t at) const { return data[at] | data[at + 1] << 8; }
  uint32_t little24(size_t at) const { return little16(at) | data[at + 2] << 16; }
  uint32_t little32(size_t at) const { return little16(at) | little16(at + 2) << 16; }
};

// The first image file directory of a TIFF stream (TIFF 6.0, section 2).
class Directory {
 public:
  enum Tag : uint16_t {
    kSubfileType = 254,
    kWidth = 256,
    kHeight = 257,
    kBitsPerSample = 258,
    kCompression = 259,
    kPhotometric = 262,
    kStripOffsets = 273,
    kOrientation = 274,
    kSamplesPerPixel = 277,
    kStripByteCounts = 279,
    kPlanar = 284,
    kTileOffsets = 324,
    kTileByteCounts = 325,
    kExtraSamples = 338,
    kSampleFormat = 339,
  };

  explicit Directory(Bytes tiff) : tiff_(tiff) {
    if (tiff.size < 8) return;
    big_endian_ = tiff.data[0] == 'M';
    const size_t at = read32(4);
    if (!tiff.has(at, 2)) return;
    entries_ = at + 2;
    count_ = std::min<size_t>(read16(at), (tiff.size - entries_) / 12);  // those that the file really holds
  }

  size_t find(Tag tag) const {  // place of the tag's entry, 0 if there is none
    for (size_t i = 0; i < count_; ++i) {
      if (read16(entries_ + 12 * i) == tag) return entries_ + 12 * i;
    }
    return 0;
  }

  // The SHORT or LONG elements of a tag; empty without it.
  struct Values {
    size_t at = 0, width = 0;
    uint32_t count = 0;
  };

  Values values(Tag tag) const {
    const size_t entry = find(tag);
    if (!entry) return {};
    Values v{entry + 8, read16(entry + 2) == 3 ? size_t{2} : size_t{4}, read32(entry + 4)};
    if (v.width * v.count > 4) v.at = read32(entry + 8);
    return v;
  }

  uint32_t element(const Values& v, uint32_t index, uint32_t fallback) const {
    const size_t at = v.at + v.width * index;
    if (index >= v.count || !tiff_.has(at, v.width)) return fallback;
    return v.width == 2 ? read16(at) : read32(at);
  }

  uint32_t first(Tag tag, uint32_t fallback) const { return element(values(tag), 0, fallback); }

  // 1 to 8, or 0 without the tag. Like nvImageCodec, reads two bytes whatever type is declared.
  uint8_t orientation() const {
    const size_t entry = find(kOrientation);
    if (!entry) return 0;
    const uint32_t value = read16(entry + 8);
    return 1 <= value && value <= 8 ? value : 1;
  }

 private:
  uint32_t read16(size_t at) const { return big_endian_ ? tiff_.big16(at) : tiff_.little16(at); }
  uint32_t read32(size_t at) const { return big_endian_ ? tiff_.big32(at) : tiff_.little32(at); }

  Bytes tiff_;
  bool big_endian_ = false;
  size_t entries_ = 0, count_ = 0;
};

// Gathers the orientation of a picture's EXIF blocks. Two that disagree are a fault: nvImageCodec
// sizes the picture by one and rotates it by the other, which overruns its buffer.
class Exif {
 public:
  void add(Bytes tiff) {
    const uint8_t found = Directory(tiff).orientation();
    if (found == 0) return;
    conflict_ |= orientation_ != 0 && orientation_ != found;
    orientation_ = found;
  }
  void settle(Picture& picture) const {
    if (orientation_ != 0) picture.orientation = orientation_;
    if (conflict_ && picture.fault == Fault::kNone) picture.fault = Fault::kExifConflict;
  }

 private:
  uint8_t orientation_ = 0;
  bool conflict_ = false;
};

// Notes the size in `picture` and says whether it is acceptable.
Fault check_size(Picture& picture, uint32_t width, uint32_t height, uint64_t max_pixels);

Fault inspect_jpeg(Bytes file, uint64_t max_pixels, Picture& picture);

}  // namespace facefast
