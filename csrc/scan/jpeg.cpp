// JPEG (ITU T.81): every marker segment is walked up to the end marker, and everything that makes
// libjpeg refuse a file before it decodes is refused here.
#include "bytes.h"

namespace facefast {
namespace {

enum Marker : uint8_t {
  kTem = 0x01,
  kSof0 = 0xc0,
  kDht = 0xc4,
  kJpg = 0xc8,
  kDac = 0xcc,
  kRst0 = 0xd0,
  kRst7 = 0xd7,
  kSoi = 0xd8,
  kEoi = 0xd9,
  kSos = 0xda,
  kDqt = 0xdb,
  kDri = 0xdd,
  kApp1 = 0xe1,
  kApp14 = 0xee,
};

// A scan bomb makes a small file cost minutes; DALI's own limit (DALI_MAX_JPEG_SCANS) is the same.
constexpr int kMaxScans = 256;

bool is_frame(uint8_t marker) {
  return marker >= kSof0 && marker < kSof0 + 16 && marker != kDht && marker != kJpg && marker != kDac;
}

class Jpeg {
 public:
  Jpeg(Bytes file, uint64_t max_pixels, Picture& picture) : file_(file), max_pixels_(max_pixels), picture_(picture) {}

  Fault walk() {
    for (size_t at = 2;;) {  // after the SOI marker
      if (!file_.has(at, 2)) return Fault::kTruncated;
      if (file_.data[at] != 0xff) return Fault::kDamagedHeader;
      const uint8_t marker = file_.data[at + 1];
      if (marker == 0xff) {  // fill byte
        ++at;
        continue;
      }
      at += 2;
      if (marker == kEoi) {
        picture_.used = at;
        return scans_ > 0 ? Fault::kNone : Fault::kNoPicture;
      }
      if (marker == kTem || (marker >= kRst0 && marker <= kRst7)) continue;  // markers without a segment
      if (marker == 0 || marker == kSoi) return Fault::kDamagedHeader;

      if (!file_.has(at, 2)) return Fault::kTruncated;
      const size_t length = file_.big16(at);
      if (length < 2) return Fault::kDamagedHeader;
      if (!file_.has(at, length)) return Fault::kTruncated;
      const Fault fault = segment(marker, file_.part(at + 2, length - 2));
      if (fault != Fault::kNone) return fault;
      at += length;

      // Entropy-coded data has no length: its end is the next marker. A file that was cut off ends there.
      if (marker == kSos) {
        const size_t end = end_of_scan(at);
        if (end == file_.size) return Fault::kTruncated;
        if (end == at) return Fault::kNoPicture;
        at = end;
      }
    }
  }

  const Exif& exif() const { return exif_; }

 private:
  Fault segment(uint8_t marker, Bytes body) {
    if (is_frame(marker)) return frame(marker, body);
    switch (marker) {
      case kDqt:
        return quantisation_tables(body);
      case kDht:
        return huffman_tables(body);
      case kDri:
        return body.size == 2 ? Fault::kNone : Fault::kDamagedHeader;
      case kSos:
        return scan(body);
      case kJpg:
        return Fault::kVariant;
      case kApp1:
        if (body.matches(0, "Exif\0\0", 6)) exif_.add(body.part(6, body.size - 6));
        return Fault::kNone;
      case kApp14:
        adobe_ |= body.size >= 12 && body.matches(0, "Adobe", 5);
        return Fault::kNone;
      default:
        return Fault::kNone;
    }
  }

  Fault frame(uint8_t marker, Bytes body) {
    if (components_ != 0 || body.size < 6) return Fault::kDamagedHeader;
    const uint8_t process = marker - kSof0;
    // Baseline, extended and progressive with Huffman codes; extended and progressive with arithmetic
    // ones. Not lossless or hierarchical, nor 12 bits a sample.
    const bool decodable = process <= 2 || process == 9 || process == 10;
    if (!decodable || body.data[0] != 8) return Fault::kVariant;
    const size_t components = body.data[5];
    if (body.size != 6 + 3 * components) return Fault::kDamagedHeader;
    if (components != 1 && components != 3 && components != 4) return Fault::kDamagedHeader;
    for (size_t i = 0; i < components; ++i) {
      const uint8_t* c = body.data + 6 + 3 * i;
      const int across = c[1] >> 4, down = c[1] & 15;
      if (across < 1 || across > 4 || down < 1 || down > 4 || c[2] > 3) {
        return Fault::kDamagedHeader;
      }
      ids_[i] = c[0];
      tables_of_[i] = c[2];
    }
    components_ = components;
    return check_size(picture_, body.big16(3), body.big16(1), max_pixels_);
  }

  Fault quantisation_tables(Bytes body) {
    for (size_t at = 0; at < body.size;) {
      const int wide = body.data[at] >> 4 ? 2 : 1, table = body.data[at] & 15;
      if (table > 3 || !body.has(at, 1 + 64 * wide)) return Fault::kDamagedHeader;
      tables_seen_ |= 1 << table;
      at += 1 + 64 * wide;
    }
    return Fault::kNone;
  }

  Fault huffman_tables(Bytes body) {
    for (size_t at = 0; at < body.size;) {
      if (!body.has(at, 17)) return Fault::kDamagedHeader;
      const int type = body.data[at] >> 4, table = body.data[at] & 15;
      size_t codes = 0;
      for (int i = 1; i <= 16; ++i) codes += body.data[at + i];
      if (type > 1 || table > 3 || codes > 256 || !body.has(at, 17 + codes)) {
        return Fault::kDamagedHeader;
      }
      at += 17 + codes;
    }
    return Fault::kNone;
  }

  Fault scan(Bytes body) {
    const size_t in_scan = body.size > 0 ? body.data[0] : 0;
    if (components_ == 0 || in_scan < 1 || in_scan > 4 || body.size != 4 + 2 * in_scan) {
      return Fault::kDamagedHeader;
    }
    for (size_t i = 0; i < in_scan; ++i) {
      // A scan may only name components of the frame, whose tables have come by now.
      const uint8_t* const id = std::find(ids_, ids_ + components_, body.data[1 + 2 * i]);
      if (id == ids_ + components_) return Fault::kDamagedHeader;
      if (!(tables_seen_ >> tables_of_[id - ids_] & 1)) return Fault::kDamagedHeader;
    }
    // Adobe writes CMYK inverted; without its mark decoders differ in whether that was done.
    if (components_ == 4 && !adobe_) return Fault::kColors;
    return ++scans_ > kMaxScans ? Fault::kTooManyScans : Fault::kNone;
  }

  // Place of the marker that ends the entropy-coded data starting at `at`, or the file's size.
  // There 0xff is always followed by a zero, a restart number or another 0xff, except at a marker.
  size_t end_of_scan(size_t at) const {
    const uint8_t* const end = file_.data + file_.size;
    const uint8_t* p = file_.data + at;
    while ((p = static_cast<const uint8_t*>(std::memchr(p, 0xff, end - p))) && p + 1 < end) {
      const uint8_t next = p[1];
      if (next == 0xff) {
        ++p;
      } else if (next == 0 || (next >= kRst0 && next <= kRst7)) {
        p += 2;
      } else {
        return p - file_.data;
      }
    }
    return file_.size;
  }

  Bytes file_;
  uint64_t max_pixels_;
  Picture& picture_;
  Exif exif_;
  size_t components_ = 0;
  uint8_t ids_[4] = {}, tables_of_[4] = {};
  int tables_seen_ = 0, scans_ = 0;
  bool adobe_ = false;
};

}  // namespace

Fault inspect_jpeg(Bytes file, uint64_t max_pixels, Picture& picture) {
  Jpeg jpeg(file, max_pixels, picture);
  picture.fault = jpeg.walk();
  jpeg.exif().settle(picture);
  return picture.fault;
}

}  // namespace facefast
