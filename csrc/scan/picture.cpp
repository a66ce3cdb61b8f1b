// A parser for each format, and how formats are recognised. The bytes may be anything: every length
// and offset is the file's word and is checked before it is followed.
#include "picture.h"

#include "bytes.h"
#include "hash.h"

namespace facefast {
namespace {

constexpr uint32_t kMaxSide = 65500;  // libjpeg's limit, close to what the others can do

// PNG (ISO/IEC 15948). libpng stops at a bad checksum of a critical chunk and skips an ancillary
// one, whose EXIF nvImageCodec obeys all the same and crashes: no bad checksum passes.
Fault inspect_png(Bytes file, uint64_t max_pixels, Picture& picture) {
  constexpr size_t kFrame = 12;  // length, type and checksum around a chunk's body
  bool palette = false, needs_palette = false, pixels = false;
  Exif exif;
  for (size_t at = 8;;) {
    if (!file.has(at, kFrame)) return Fault::kTruncated;
    const size_t length = file.big32(at);
    if (!file.has(at, kFrame + length)) return Fault::kTruncated;  // of 32 bits: the sum cannot wrap
    const auto is = [&](const char* type) { return file.matches(at + 4, type, 4); };
    if (crc32(file.data + at + 4, length + 4) != file.big32(at + 8 + length)) {
      return Fault::kBadChecksum;
    }
    const Bytes body = file.part(at + 8, length);

    if (is("IHDR") != (at == 8)) return Fault::kDamagedHeader;
    if (is("IHDR")) {
      if (length != 13) return Fault::kDamagedHeader;
      const uint8_t depth = body.data[8], color = body.data[9];
      const bool power = depth == 1 || depth == 2 || depth == 4 || depth == 8 || depth == 16;
      const bool known = (color == 0 && power) || (color == 3 && power && depth <= 8) ||
                         ((color == 2 || color == 4 || color == 6) && power && depth >= 8);
      if (!known || body.data[10] != 0 || body.data[11] != 0 || body.data[12] > 1) {
        return Fault::kDamagedHeader;
      }
      needs_palette = color == 3;
      const Fault fault = check_size(picture, body.big32(0), body.big32(4), max_pixels);
      if (fault != Fault::kNone) return fault;
    } else if (is("IEND")) {
      if (!pixels || (needs_palette && !palette)) return Fault::kNoPicture;
      exif.settle(picture);
      return picture.fault;
    } else if (is("IDAT")) {
      pixels |= length > 0;
    } else if (is("PLTE")) {
      palette = true;
    } else if (is("eXIf")) {
      exif.add(body);
    } else if ((file.data[at + 4] & 0x20) == 0) {
      return Fault::kDamagedHeader;  // a critical chunk that no decoder knows
    }
    at += kFrame + length;
  }
}

// WebP (RFC 9649).
Fault inspect_webp(Bytes file, uint64_t max_pixels, Picture& picture) {
  constexpr uint8_t kAnimation = 0x02, kExif = 0x08;
  if (!file.matches(0, "RIFF", 4)) return Fault::kNotAPicture;
  const size_t total = size_t{8} + file.little32(4);
  if (total > file.size) return Fault::kTruncated;
  file = file.part(0, total);
  uint8_t flags = 0;
  bool pixels = false, odd = false, exif_readable = false;
  Exif exif;
  for (size_t at = 12; at + 8 <= total;) {
    const size_t length = file.little32(at + 4);
    const auto is = [&](const char* type) { return file.matches(at, type, 4); };
    if (!file.has(at + 8, length)) return Fault::kTruncated;
    const Bytes body = file.part(at + 8, length);
    uint32_t width = 0, height = 0;
    bool sized = false;
    if (is("VP8X")) {
      if (length < 10) return Fault::kDamagedHeader;
      flags = body.data[0];
      width = 1 + body.little24(4), height = 1 + body.little24(7);
      sized = true;
    } else if (is("VP8 ") && !pixels) {
      if (length < 10 || (body.data[0] & 1) || !body.matches(3, "\x9d\x01\x2a", 3)) {
        return Fault::kDamagedHeader;
      }
      if ((body.little24(0) >> 5) > length) return Fault::kTruncated;  // first partition
      width = body.little16(6) & 0x3fff, height = body.little16(8) & 0x3fff;
      sized = pixels = true;
    } else if (is("VP8L") && !pixels) {
      if (length < 5 || body.data[0] != 0x2f || body.data[4] >> 5 != 0) {
        return Fault::kDamagedHeader;
      }
      const uint32_t bits = body.little32(1);
      width = 1 + (bits & 0x3fff), height = 1 + (bits >> 14 & 0x3fff);
      sized = pixels = true;
    } else if (is("ANIM") || is("ANMF")) {
      flags |= kAnimation;
    } else if (is("EXIF") && (flags & kExif)) {
      exif.add(body);
      exif_readable = !odd;
    }
    if (sized) {
      const bool canvas_differs = picture.width != 0 && (picture.width != width || picture.height != height);
      if (canvas_differs) return Fault::kDamagedHeader;
      const Fault fault = check_size(picture, width, height, max_pixels);
      if (fault != Fault::kNone) return fault;
    }
    odd |= length % 2 != 0;
    at += 8 + length + length % 2;
  }
  if (flags & kAnimation) return Fault::kAnimatedWebp;
  if (!pixels) return Fault::kNoPicture;
  // nvImageCodec 0.9 forgets the padding of odd chunks on its way to the EXIF that VP8X promises.
  if ((flags & kExif) && !exif_readable) return Fault::kWebpExif;
  exif.settle(picture);
  return picture.fault;
}

// BMP: what OpenCV decodes without run lengths, with its whole pixel array in the file.
Fault inspect_bmp(Bytes file, uint64_t max_pixels, Picture& picture) {
  if (!file.has(0, 26)) return Fault::kTruncated;
  const size_t start = file.little32(10);
  const uint32_t header = file.little32(14);
  const bool old = header == 12;
  if (!old && (header < 40 || header > 124)) return Fault::kDamagedHeader;
  if (!file.has(14, header)) return Fault::kTruncated;
  const int32_t signed_width = old ? file.little16(18) : file.little32(18);
  const int32_t signed_height = old ? file.little16(20) : file.little32(22);
  const uint32_t bits = old ? file.little16(24) : file.little16(28);
  const uint32_t compression = old ? 0 : file.little32(30);
  if (signed_width < 0 || signed_height == INT32_MIN) return Fault::kDamagedHeader;
  const uint32_t height = signed_height < 0 ? -signed_height : signed_height;  // top row first
  const Fault fault = check_size(picture, signed_width, height, max_pixels);
  if (fault != Fault::kNone) return fault;
  const bool indexed = bits == 1 || bits == 4 || bits == 8;
  const bool plain = compression == 0 && (indexed || bits == 24 || bits == 32);
  const bool masked = compression == 3 && bits == 32;
  if (!plain && !masked) return Fault::kVariant;
  if (masked && header == 40) {  // OpenCV passes over masks behind the header
    if (!file.has(54, 12)) return Fault::kTruncated;
    const bool usual = file.little32(54) == 0xff0000 && file.little32(58) == 0xff00 && file.little32(62) == 0xff;
    if (!usual) return Fault::kColors;
  }
  const uint64_t row = (uint64_t{picture.width} * bits + 31) / 32 * 4;
  return file.has(start, row * height) ? Fault::kNone : Fault::kTruncated;
}

// Whether nvImageCodec and Pillow agree on what the samples of a TIFF mean, as tried with each kind; elsewhere one of
// them fails, forgets to invert, takes Lab by another white, or mixes up the planes.
bool tiff_colors_are_certain(const Directory& directory, uint32_t compression, uint32_t bits) {
  enum : uint32_t { kWhiteIsZero, kBlackIsZero, kRgb, kPalette, kMask, kCmyk, kYcbcr };
  constexpr uint32_t kUnknown = UINT32_MAX, kJpegInside = 7, kPremultiplied = 1;
  const uint32_t photometric = directory.first(Directory::kPhotometric, kUnknown);
  const uint32_t samples = directory.first(Directory::kSamplesPerPixel, 1);
  const bool planar = directory.first(Directory::kPlanar, 1) != 1 && samples > 1;
  if (planar && (bits != 8 || samples != (photometric == kCmyk ? 4 : 3))) return false;
  switch (photometric) {
    case kBlackIsZero:
      return samples == 1;
    case kWhiteIsZero:
    case kPalette:
      return samples == 1 && bits == 8;
    case kRgb:
      return samples == 3 || (samples == 4 && directory.first(Directory::kExtraSamples, 0) != kPremultiplied);
    case kCmyk:
      return samples == 4 && bits == 8;
    case kYcbcr:
      return samples == 3 && compression == kJpegInside;
    default:
      return false;
  }
}

// TIFF 6.0: the first picture, 8 or 16 bits per sample, every strip or tile inside the file.
Fault inspect_tiff(Bytes file, uint64_t max_pixels, Picture& picture) {
  const Directory directory(file);
  if (!directory.find(Directory::kWidth)) return Fault::kTruncated;  // it often ends the file
  const uint32_t width = directory.first(Directory::kWidth, 0);
  const uint32_t height = directory.first(Directory::kHeight, 0);
  const Fault fault = check_size(picture, width, height, max_pixels);
  if (fault != Fault::kNone) return fault;

  constexpr uint32_t kDecodable[] = {1, 5, 7, 8, 32773, 32946};  // none, LZW, JPEG, zip, PackBits
  const uint32_t compression = directory.first(Directory::kCompression, 1);
  const uint32_t bits = directory.first(Directory::kBitsPerSample, 1);
  const bool known = std::count(std::begin(kDecodable), std::end(kDecodable), compression) > 0 &&
                     (bits == 8 || bits == 16) &&
                     directory.first(Directory::kSampleFormat, 1) == 1;  // unsigned integers
  if (!known) return Fault::kVariant;
  // Raw files of cameras begin with a thumbnail, which would pass for the photograph.
  if (directory.first(Directory::kSubfileType, 0) & 1) return Fault::kVariant;
  if (!tiff_colors_are_certain(directory, compression, bits)) return Fault::kColors;

  const bool tiled = directory.find(Directory::kTileOffsets) != 0;
  const auto offsets = directory.values(tiled ? Directory::kTileOffsets : Directory::kStripOffsets);
  const auto lengths = directory.values(tiled ? Directory::kTileByteCounts : Directory::kStripByteCounts);
  if (offsets.count == 0 || lengths.count != offsets.count) return Fault::kNoPicture;
  for (uint32_t i = 0; i < offsets.count; ++i) {
    const size_t at = directory.element(offsets, i, UINT32_MAX);
    const size_t length = directory.element(lengths, i, UINT32_MAX);
    if (!file.has(at, length)) return Fault::kTruncated;
  }
  if (const uint8_t orientation = directory.orientation()) picture.orientation = orientation;
  return Fault::kNone;
}

// Binary PBM, PGM and PPM: three or four numbers among blanks and comments, then the pixels.
Fault inspect_pnm(Bytes file, uint64_t max_pixels, Picture& picture) {
  const char type = file.data[1];
  uint32_t numbers[3] = {0, 0, 1};  // width, height, greatest value
  size_t at = 2;
  for (int i = 0; i < (type == '4' ? 2 : 3); ++i) {
    bool comment = false;
    for (; at < file.size; ++at) {
      const uint8_t c = file.data[at];
      comment = comment ? c != '\n' : c == '#';
      if (!comment && c != ' ' && c != '\t' && c != '\r' && c != '\n') break;
    }
    if (at == file.size) return Fault::kTruncated;
    uint64_t number = 0;
    const size_t start = at;
    for (; at < file.size && '0' <= file.data[at] && file.data[at] <= '9'; ++at) {
      number = std::min<uint64_t>(number * 10 + file.data[at] - '0', UINT32_MAX);
    }
    if (at == start) return Fault::kDamagedHeader;
    numbers[i] = number;
  }
  const Fault fault = check_size(picture, numbers[0], numbers[1], max_pixels);
  if (fault != Fault::kNone) return fault;
  if (numbers[2] < 1 || numbers[2] > 65535) return Fault::kDamagedHeader;
  // Others are not stretched to 255 by OpenCV: a picture of 0 to 15 would be black.
  if (type != '4' && numbers[2] != 255 && numbers[2] != 65535) return Fault::kLevels;
  const uint64_t bits = type == '4' ? 1 : (type == '6' ? 3 : 1) * (numbers[2] > 255 ? 16 : 8);
  const uint64_t row = (numbers[0] * bits + 7) / 8;
  return file.has(at + 1, row * numbers[1]) ? Fault::kNone : Fault::kTruncated;
}

struct Signature {
  const char* bytes;
  size_t size, at;
  Fault fault;
  Kind kind;
};

// Formats by their first bytes; names and extensions say nothing.
constexpr Signature kSignatures[] = {
    {"\xff\xd8\xff", 3, 0, Fault::kNone, Kind::kJpeg},
    {"\x89PNG\r\n\x1a\n", 8, 0, Fault::kNone, Kind::kPng},
    {"WEBP", 4, 8, Fault::kNone, Kind::kWebp},
    {"BM", 2, 0, Fault::kNone, Kind::kBmp},
    {"II*\0", 4, 0, Fault::kNone, Kind::kTiff},
    {"MM\0*", 4, 0, Fault::kNone, Kind::kTiff},
    {"P4", 2, 0, Fault::kNone, Kind::kPnm},
    {"P5", 2, 0, Fault::kNone, Kind::kPnm},
    {"P6", 2, 0, Fault::kNone, Kind::kPnm},
    {"GIF8", 4, 0, Fault::kGif, Kind::kUnknown},
    {"ftypavi", 7, 4, Fault::kAvif, Kind::kUnknown},
    {"ftyphei", 7, 4, Fault::kHeic, Kind::kUnknown},
    {"ftyphev", 7, 4, Fault::kHeic, Kind::kUnknown},
    {"ftypmif1", 8, 4, Fault::kHeic, Kind::kUnknown},
    {"\0\0\0\x0cjP  ", 8, 0, Fault::kJpeg2000, Kind::kUnknown},
    {"\xff\x4f\xff\x51", 4, 0, Fault::kJpeg2000, Kind::kUnknown},
    {"\0\0\0\x0cJXL ", 8, 0, Fault::kJpegXl, Kind::kUnknown},
    {"\xff\x0a", 2, 0, Fault::kJpegXl, Kind::kUnknown},
    {"II+\0", 4, 0, Fault::kOtherFormat, Kind::kUnknown},             // BigTIFF
    {"MM\0+", 4, 0, Fault::kOtherFormat, Kind::kUnknown},             // BigTIFF
    {"8BPS", 4, 0, Fault::kOtherFormat, Kind::kUnknown},              // Photoshop
    {"\0\0\1\0", 4, 0, Fault::kOtherFormat, Kind::kUnknown},          // icon
    {"\x76\x2f\x31\x01", 4, 0, Fault::kOtherFormat, Kind::kUnknown},  // OpenEXR
    {"DDS ", 4, 0, Fault::kOtherFormat, Kind::kUnknown},
    {"qoif", 4, 0, Fault::kOtherFormat, Kind::kUnknown},
    {"P1\n", 3, 0, Fault::kOtherFormat, Kind::kUnknown},  // PNM in decimal digits
    {"P2\n", 3, 0, Fault::kOtherFormat, Kind::kUnknown},
    {"P3\n", 3, 0, Fault::kOtherFormat, Kind::kUnknown},
};

}  // namespace

Fault check_size(Picture& picture, uint32_t width, uint32_t height, uint64_t max_pixels) {
  picture.width = width;
  picture.height = height;
  if (width == 0 || height == 0) return Fault::kZeroSize;
  const bool too_many = std::max(width, height) > kMaxSide || uint64_t{width} * height > max_pixels;
  return too_many ? Fault::kTooManyPixels : Fault::kNone;
}

Picture inspect(const uint8_t* data, size_t size, uint64_t max_pixels) {
  const Bytes file{data, size};
  Picture picture;
  if (size == 0) {
    picture.fault = Fault::kEmpty;
    return picture;
  }
  picture.fault = Fault::kNotAPicture;
  for (const Signature& s : kSignatures) {
    if (!file.matches(s.at, s.bytes, s.size)) continue;
    picture.fault = s.fault;
    picture.kind = s.kind;
    break;
  }
  switch (picture.kind) {
    case Kind::kUnknown:
      break;
    case Kind::kJpeg:
      picture.fault = inspect_jpeg(file, max_pixels, picture);
      break;
    case Kind::kPng:
      picture.fault = inspect_png(file, max_pixels, picture);
      break;
    case Kind::kWebp:
      picture.fault = inspect_webp(file, max_pixels, picture);
      break;
    case Kind::kBmp:
      picture.fault = inspect_bmp(file, max_pixels, picture);
      break;
    case Kind::kTiff:
      picture.fault = inspect_tiff(file, max_pixels, picture);
      break;
    case Kind::kPnm:
      picture.fault = inspect_pnm(file, max_pixels, picture);
      break;
  }
  return picture;
}

Picture inspect_beginning(const uint8_t* data, size_t size) {
  Picture picture = inspect(data, size, UINT64_MAX);
  if (picture.width && picture.height) picture.fault = Fault::kNone;  // cut off behind its size, as it must be
  return picture;
}

}  // namespace facefast
