// What a picture's bytes say about it without decoding: format, size, orientation, and whether a
// decoder would get through.
#pragma once

#include <cstddef>
#include <cstdint>

namespace facefast {

// Why a row cannot be used. The numbers are stored in saved indices: append, never renumber.
enum class Fault : uint8_t {
  kNone,
  kMissing,
  kNotAFile,
  kUnreadable,
  kEmpty,
  kOutsideFile,
  kTooManyBytes,
  kNotAPicture,
  kGif,
  kAvif,
  kHeic,
  kJpeg2000,
  kJpegXl,
  kOtherFormat,
  kAnimatedWebp,
  kVariant,
  kZeroSize,
  kTooManyPixels,
  kDamagedHeader,
  kTruncated,
  kBadChecksum,
  kNoPicture,
  kTooManyScans,
  kExifConflict,
  kWebpExif,
  kColors,
  kLevels,
  kChanged,
};

inline constexpr const char* kFaultNames[] = {
    "ok",
    "missing",
    "not a regular file",
    "unreadable (permission or I/O error)",
    "empty file",
    "range outside its file",
    "too many bytes (more than 16 MiB and 8 for each pixel, or than 128 MiB)",
    "not a picture",
    "unsupported: GIF",
    "unsupported: AVIF",
    "unsupported: HEIC",
    "unsupported: JPEG 2000",
    "unsupported: JPEG XL",
    "unsupported: other format",
    "unsupported: animated WebP",
    "unsupported: variant of its format",
    "zero width or height",
    "too many pixels",
    "damaged header",
    "truncated",
    "checksum mismatch",
    "no picture data",
    "too many scans",
    "EXIF blocks disagree on orientation",
    "unsupported: EXIF layout of WebP",
    "unsupported: colour layout",
    "unsupported: greatest value of PNM other than 255 and 65535",
    "changed since it was indexed",
};
static_assert(sizeof(kFaultNames) / sizeof(*kFaultNames) == static_cast<size_t>(Fault::kChanged) + 1);

enum class Kind : uint8_t { kUnknown, kJpeg, kPng, kWebp, kBmp, kTiff, kPnm };

inline constexpr const char* kKindNames[] = {"unknown", "jpeg", "png", "webp", "bmp", "tiff", "pnm"};

struct Picture {
  Fault fault = Fault::kNone;
  Kind kind = Kind::kUnknown;
  uint8_t orientation = 1;  // EXIF, 1 to 8
  uint32_t width = 0,
           height = 0;  // as stored, before orientation; 0 where the header is unreadable
  size_t used = 0;      // bytes up to the picture's end, where more may follow it; 0 where nobody knows
};

// An encoded picture may have so many bytes beside those for its pixels, 16-bit RGBA at most: for colour profiles,
// previews, and the films that phones put behind their photographs.
// Several of them are in memory at a time: above `kMostBytes` none is read, whatever its pixels.
constexpr uint64_t kFreeBytes = uint64_t{16} << 20, kBytesPerPixel = 8, kMostBytes = uint64_t{128} << 20;

// The size of a picture by its beginning, for a file that is too large to be read before that is known: the first
// `size` bytes, or of a TIFF the directory behind its header. A fault where it does not show.
Picture inspect_beginning(const uint8_t* data, size_t size);

// Enough bytes for `inspect` to tell every format that it knows from everything else.
inline constexpr size_t kSniffBytes = 64;

// Reads the headers of the whole encoded picture `data`. A fault is reported exactly where the
// CPU decoder of DALI 2.4 (nvImageCodec 0.9) fails, crashes or decodes garbage, as far as headers,
// lengths, checksums and end markers can tell, or where a picture has more than `max_pixels`.
Picture inspect(const uint8_t* data, size_t size, uint64_t max_pixels);

}  // namespace facefast
