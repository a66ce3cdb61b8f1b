// facefast._scan: reads pictures from files or ranges of files with threads of its own, the GIL
// released, and says what `inspect` finds.
#include <fcntl.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sched.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "hash.h"
#include "picture.h"

namespace py = pybind11;

namespace facefast {
namespace {

// A file above this is sniffed first, so that a film with a picture's name is not read whole.
constexpr int64_t kSniffAbove = int64_t{1} << 20;
// Above this only as much is read as shows the picture's size, which says how many bytes it may have.
constexpr int64_t kMeasureAbove = kFreeBytes;
constexpr int64_t kMeasureBytes = int64_t{1} << 20;

int usable_cores() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
}

// Threads that are joined on every way out: they work on the caller's variables.
class Team {
 public:
  template <class Work>
  Team(int count, const Work& work) {
    for (int i = 0; i < count; ++i) threads_.emplace_back(work);
  }
  Team(Team&&) = delete;
  ~Team() {
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  std::vector<std::thread> threads_;
};

// One thread's way to the bytes of a row: `open`, then `read`. A container of many pictures stays
// open from row to row; everything else is opened once and closed.
class Source {
 public:
  Source(int folder, uint64_t max_pixels) : folder_(folder), max_pixels_(max_pixels) {}
  Source(Source&&) = delete;
  ~Source() { close(); }

  // Sets `size()` to the picture's bytes. `offset` and `length` are -1 for a whole file.
  Fault open(const std::string& path, int64_t offset, int64_t length) {
    size_ = 0;
    if (file_ < 0 || offset < 0 || path != path_) {
      const Fault fault = open_file(path);
      if (fault != Fault::kNone) return fault;
    }
    offset_ = std::max<int64_t>(offset, 0);
    if (offset_ > file_size_) return Fault::kOutsideFile;
    const int64_t size = length < 0 ? file_size_ - offset_ : length;
    if (size > file_size_ - offset_) return Fault::kOutsideFile;
    if (size > kSniffAbove) {
      uint8_t head[kSniffBytes];
      if (pread(file_, head, kSniffBytes, offset_) != static_cast<ssize_t>(kSniffBytes)) {
        return Fault::kUnreadable;
      }
      const Picture picture = inspect(head, kSniffBytes, 0);
      if (picture.kind == Kind::kUnknown) return picture.fault;
      if (size > kMeasureAbove) {
        const Picture measured = picture.kind == Kind::kTiff ? measure_tiff(head) : measure(size);
        if (measured.fault != Fault::kNone) return Fault::kTooManyBytes;
        const uint64_t pixels = uint64_t{measured.width} * measured.height;
        if (pixels > max_pixels_) return Fault::kTooManyPixels;
        const uint64_t most = std::min(kFreeBytes + kBytesPerPixel * pixels, kMostBytes);
        if (size > static_cast<int64_t>(most)) return Fault::kTooManyBytes;
      }
    }
    size_ = size;
    return Fault::kNone;
  }

  int64_t size() const { return size_; }

  // Fills `to` with `size()` bytes; a file that has shrunk since `open` makes `size()` smaller.
  Fault read(uint8_t* to) {
    int64_t done = 0;
    // pread may give less than was asked for, and is interrupted by signals; it moves no file position.
    while (done < size_) {
      const ssize_t count = pread(file_, to + done, size_ - done, offset_ + done);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) return Fault::kUnreadable;
      if (count == 0) break;
      done += count;
    }
    size_ = done;
    return Fault::kNone;
  }

 private:
  Fault open_file(const std::string& path) {
    close();
    // Opening a device or a pipe may already do something, so it is asked first what this is. What takes the file's
    // place after that is not waited for (O_NONBLOCK), and read to the size seen here at most.
    struct stat status;
    if (fstatat(folder_, path.c_str(), &status, 0) != 0) return failed_to_reach();
    if (!S_ISREG(status.st_mode)) return Fault::kNotAFile;
    file_ = openat(folder_, path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file_ < 0) return failed_to_reach();
    file_size_ = status.st_size;
    path_ = path;
    return Fault::kNone;
  }

  static Fault failed_to_reach() {
    const bool missing = errno == ENOENT || errno == ENOTDIR || errno == ELOOP;
    return missing ? Fault::kMissing : Fault::kUnreadable;
  }

  void close() {
    if (file_ >= 0) ::close(file_);
    file_ = -1;
  }

  // The beginning of a file, more of it where the size does not show yet: profiles and previews may come first.
  Picture measure(int64_t size) {
    Picture picture;
    for (int64_t part : {kMeasureBytes, kMeasureAbove}) {
      std::vector<uint8_t> beginning(std::min(part, size));
      if (!fill(beginning, offset_)) break;
      picture = inspect_beginning(beginning.data(), beginning.size());
      if (picture.fault == Fault::kNone) break;
    }
    return picture;
  }

  // A TIFF's directory may be its last bytes. Put right behind the header it is a TIFF of its own.
  Picture measure_tiff(const uint8_t* head) {
    constexpr size_t kHeader = 8, kEntry = 12;
    const bool big = head[0] == 'M';
    const auto number = [big](const uint8_t* at, int count) {
      uint64_t value = 0;
      for (int i = 0; i < count; ++i) value = value << 8 | at[big ? i : count - 1 - i];
      return value;
    };
    Picture picture;
    picture.fault = Fault::kDamagedHeader;
    const int64_t at = offset_ + static_cast<int64_t>(number(head + 4, 4));
    std::vector<uint8_t> entries(2);
    if (!fill(entries, at)) return picture;
    entries.resize(2 + kEntry * number(entries.data(), 2));
    if (!fill(entries, at)) return picture;
    std::vector<uint8_t> tiff(head, head + kHeader);
    for (size_t i = 4; i < kHeader; ++i) tiff[i] = 0;
    tiff[big ? kHeader - 1 : 4] = kHeader;
    tiff.insert(tiff.end(), entries.begin(), entries.end());
    return inspect_beginning(tiff.data(), tiff.size());
  }

  bool fill(std::vector<uint8_t>& to, int64_t at) const {
    size_t done = 0;
    while (done < to.size()) {
      const ssize_t count = pread(file_, to.data() + done, to.size() - done, at + done);
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) return false;
      done += count;
    }
    return true;
  }

  const int folder_;
  const uint64_t max_pixels_;
  int file_ = -1;
  int64_t file_size_ = 0, offset_ = 0, size_ = 0;
  std::string path_;
};

// The columns that say where each picture is: numpy bytes (S) and two int64.
class Rows {
 public:
  Rows(const py::object& paths, const py::object& offsets, const py::object& lengths)
      : paths_(py::array::ensure(paths)), offsets_(column(offsets)), lengths_(column(lengths)) {
    if (!paths_) throw py::error_already_set();
    count_ = paths_.ndim() == 1 ? paths_.shape(0) : -1;
    if (count_ < 0 || (count_ > 0 && paths_.dtype().kind() != 'S')) {
      throw std::invalid_argument("paths must be one column of bytes");
    }
    if (offsets_.ndim() != 1 || offsets_.size() != count_ || lengths_.ndim() != 1 || lengths_.size() != count_) {
      throw std::invalid_argument("paths, offsets and lengths must be columns of one length; they have " +
                                  std::to_string(count_) + ", " + std::to_string(offsets_.size()) + " and " +
                                  std::to_string(lengths_.size()) + " rows");
    }
    bytes_ = static_cast<const char*>(paths_.data());
    stride_ = count_ > 0 ? paths_.strides(0) : 0;
    width_ = paths_.itemsize();
  }

  int64_t count() const { return count_; }
  void path(int64_t row, std::string& to) const {
    const char* const text = bytes_ + row * stride_;
    to.assign(text, strnlen(text, width_));
  }
  int64_t offset(int64_t row) const { return offsets_.data()[row]; }
  int64_t length(int64_t row) const { return lengths_.data()[row]; }

 private:
  using Column = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
  static Column column(const py::object& values) {
    Column array = Column::ensure(values);
    if (!array) throw py::error_already_set();
    return array;
  }

  py::array paths_;
  Column offsets_, lengths_;
  int64_t count_ = 0;
  const char* bytes_ = nullptr;
  int64_t stride_ = 0;
  size_t width_ = 0;
};

template <class T>
T* writable(py::dict& columns, const char* name, int64_t rows, int64_t width = 0) {
  const auto shape = width ? std::vector<py::ssize_t>{rows, width} : std::vector<py::ssize_t>{rows};
  py::array_t<T> column(shape);
  columns[name] = column;
  return column.mutable_data();
}

py::dict scan_rows(const py::bytes& root, const py::object& paths, const py::object& offsets, const py::object& lengths,
                   int threads, uint64_t max_pixels, const py::object& progress) {
  const Rows rows(paths, offsets, lengths);
  const int64_t count = rows.count();
  py::dict columns;
  auto* const fault = writable<uint8_t>(columns, "fault", count);
  auto* const kind = writable<uint8_t>(columns, "kind", count);
  auto* const orientation = writable<uint8_t>(columns, "orientation", count);
  auto* const width = writable<int32_t>(columns, "width", count);
  auto* const height = writable<int32_t>(columns, "height", count);
  auto* const size = writable<int64_t>(columns, "size", count);
  auto* const hash = writable<uint64_t>(columns, "hash", count, 2);

  const std::string folder(root);
  const int folder_fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder_fd < 0) {
    PyErr_SetFromErrnoWithFilename(PyExc_OSError, folder.c_str());
    throw py::error_already_set();
  }
  const std::shared_ptr<void> close_folder(nullptr, [folder_fd](void*) { ::close(folder_fd); });

  // Threads take rows as they finish others, so that a slow file holds up one thread and not a fixed
  // part of the rows. Each writes to its rows of the columns alone: nothing needs a lock.
  constexpr int64_t kGrain = 32;  // rows taken at a time: neighbours share a container
  std::atomic<int64_t> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable finished;
  const auto work = [&] {
    Source source(folder_fd, max_pixels);
    std::string path;
    std::vector<uint8_t> buffer;
    const auto look = [&](int64_t row) {
      Picture picture;
      rows.path(row, path);
      picture.fault = source.open(path, rows.offset(row), rows.length(row));
      size[row] = source.size();
      hash[2 * row] = hash[2 * row + 1] = 0;
      if (picture.fault == Fault::kNone) {
        if (buffer.size() < static_cast<size_t>(source.size())) buffer.resize(source.size());
        picture.fault = source.read(buffer.data());
      }
      if (picture.fault == Fault::kNone) {
        picture = inspect(buffer.data(), source.size(), max_pixels);
      }
      if (picture.fault == Fault::kNone) {
        const Hash128 content = murmur3(buffer.data(), source.size());
        hash[2 * row] = content.low, hash[2 * row + 1] = content.high;
      }
      return picture;
    };
    for (int64_t begin; (begin = next.fetch_add(kGrain)) < count;) {
      const int64_t end = std::min(begin + kGrain, count);
      for (int64_t row = begin; row < end; ++row) {
        Picture picture;
        try {
          picture = look(row);
        } catch (const std::bad_alloc&) {
          picture.fault = Fault::kTooManyBytes;
        }
        fault[row] = static_cast<uint8_t>(picture.fault);
        kind[row] = static_cast<uint8_t>(picture.kind);
        orientation[row] = picture.orientation;
        width[row] = picture.width, height[row] = picture.height;
      }
      if (done.fetch_add(end - begin) + end - begin == count) {
        const std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
  };
  {
    const py::gil_scoped_release release;
    const int wanted = threads > 0 ? threads : usable_cores();
    const Team team(std::min<int64_t>(wanted, (count + kGrain - 1) / kGrain), work);
    // The calling thread only waits: ten times a second it takes the GIL, for Ctrl-C and for progress.
    std::unique_lock<std::mutex> lock(mutex);
    for (bool last = false; !last;) {
      last = finished.wait_for(lock, std::chrono::milliseconds(100), [&] { return done == count; });
      const py::gil_scoped_acquire acquire;
      try {
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        if (!progress.is_none()) progress(done.load());
      } catch (...) {
        next = count;  // the team stops after the rows in hand
        throw;
      }
    }
  }
  return columns;
}

// The picture of one row, held by numpy once it is handed over.
struct Freed {
  void operator()(uint8_t* bytes) const { std::free(bytes); }
};
struct Loaded {
  std::unique_ptr<uint8_t, Freed> bytes;
  int64_t size = 0;
  Picture picture;
};

using Hashes = py::array_t<uint64_t, py::array::c_style>;

py::tuple read_rows(const py::object& paths, const py::object& offsets, const py::object& lengths, int threads,
                    uint64_t max_pixels, const std::optional<Hashes>& hashes, int64_t keep_bytes) {
  constexpr int64_t kAlwaysKept = int64_t{1} << 20;
  const Rows rows(paths, offsets, lengths);
  const int64_t count = rows.count();
  if (hashes && (hashes->ndim() != 2 || hashes->shape(0) != count || hashes->shape(1) != 2)) {
    throw py::value_error("hashes must be uint64 [B, 2], one row for each of the " + std::to_string(count) + " paths");
  }
  const uint64_t* const known = hashes ? hashes->data() : nullptr;
  std::vector<Loaded> batch(count);
  {
    const py::gil_scoped_release release;
    std::atomic<int64_t> next{0}, kept{0};
    const auto work = [&] {
      Source source(AT_FDCWD, max_pixels);
      std::string path;
      for (int64_t row; (row = next.fetch_add(1)) < count;) {
        Loaded& loaded = batch[row];
        Fault fault;
        try {
          rows.path(row, path);
          fault = source.open(path, rows.offset(row), rows.length(row));
          if (fault == Fault::kNone) {
            loaded.bytes.reset(static_cast<uint8_t*>(std::malloc(std::max<int64_t>(source.size(), 1))));
            if (!loaded.bytes) throw std::bad_alloc();
            fault = source.read(loaded.bytes.get());
          }
        } catch (const std::bad_alloc&) {
          fault = Fault::kTooManyBytes;
        }
        loaded.size = source.size();
        loaded.picture.fault = fault;
        if (fault == Fault::kNone) {
          loaded.picture = inspect(loaded.bytes.get(), loaded.size, max_pixels);
        }
        // 0 is a picture that was never hashed.
        if (known && loaded.picture.fault == Fault::kNone && (known[2 * row] || known[2 * row + 1])) {
          const Hash128 content = murmur3(loaded.bytes.get(), loaded.size);
          if (content.low != known[2 * row] || content.high != known[2 * row + 1]) {
            loaded.picture.fault = Fault::kChanged;
          }
        }
        if (loaded.picture.fault != Fault::kNone) {
          loaded.bytes.reset();
        } else if (loaded.picture.used) {  // what follows the picture's end would only lie in memory
          loaded.size = loaded.picture.used;
          uint8_t* const shorter = static_cast<uint8_t*>(std::realloc(loaded.bytes.get(), loaded.size));
          if (shorter) static_cast<void>(loaded.bytes.release()), loaded.bytes.reset(shorter);
        }
        // A batch of large pictures is looked at and not kept: whoever wants one reads it again.
        if (loaded.bytes && loaded.size > kAlwaysKept && kept.fetch_add(loaded.size) + loaded.size > keep_bytes) {
          kept.fetch_sub(loaded.size);
          loaded.bytes.reset();
        }
      }
    };
    // The calling thread reads too. Starting another one costs as much as reading two or three pictures.
    constexpr int64_t kWorthAThread = 16;
    const int wanted = threads > 0 ? threads : usable_cores();
    const Team team(std::min<int64_t>(wanted - 1, count / kWorthAThread), work);
    work();
  }

  py::list data(count);
  py::dict columns;
  auto* const fault = writable<uint8_t>(columns, "fault", count);
  auto* const width = writable<int32_t>(columns, "width", count);
  auto* const height = writable<int32_t>(columns, "height", count);
  auto* const orientation = writable<uint8_t>(columns, "orientation", count);
  for (int64_t row = 0; row < count; ++row) {
    Loaded& loaded = batch[row];
    fault[row] = static_cast<uint8_t>(loaded.picture.fault);
    width[row] = loaded.picture.width, height[row] = loaded.picture.height;
    orientation[row] = loaded.picture.orientation;
    if (loaded.picture.fault != Fault::kNone || !loaded.bytes) {
      data[row] = py::array_t<uint8_t>(0);
      continue;
    }
    // numpy takes the buffer over as it is; the capsule frees it with the last array that uses it.
    uint8_t* const bytes = loaded.bytes.release();
    const py::capsule owner(bytes, [](void* p) { std::free(p); });
    data[row] = py::array_t<uint8_t>(loaded.size, bytes, owner);
  }
  return py::make_tuple(data, columns["fault"], columns["width"], columns["height"], columns["orientation"]);
}

template <size_t N>
py::tuple names(const char* const (&values)[N]) {
  py::tuple result(N);
  for (size_t i = 0; i < N; ++i) result[i] = py::str(values[i]);
  return result;
}

}  // namespace
}  // namespace facefast

PYBIND11_MODULE(_scan, module) {
  using namespace facefast;
  module.doc() = "Reads pictures in parallel and says which of them a decoder would fail on.";
  module.attr("FAULTS") = names(kFaultNames);
  module.attr("KINDS") = names(kKindNames);
  module.def("scan", &scan_rows, py::arg("root"), py::arg("paths"), py::arg("offsets"), py::arg("lengths"),
             py::arg("threads"), py::arg("max_pixels"), py::arg("progress") = py::none(),
             "Inspects N pictures below `root` and returns columns: fault, kind, orientation uint8 "
             "[N], width, height int32 [N], size int64 [N], hash uint64 [N, 2] (0 where there is a "
             "fault). `progress` is called with the rows done so far, ten times a second.");
  module.def(
      "read", &read_rows, py::arg("paths"), py::arg("offsets"), py::arg("lengths"), py::arg("threads"),
      py::arg("max_pixels"), py::arg("hashes") = py::none(), py::arg("keep_bytes") = INT64_MAX,
      "Reads B pictures at absolute paths, compares them with their hashes, and returns (data, fault, width, height, "
      "orientation): a list of uint8 arrays, and columns [B]. An array is empty where fault is not 0, and where a "
      "picture above 1 MiB would make the batch longer than `keep_bytes`.");
  module.def(
      "inspect",
      [](const py::bytes& data, uint64_t max_pixels) {
        const std::string_view bytes = data;
        const Picture p = inspect(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size(), max_pixels);
        return py::make_tuple(static_cast<int>(p.fault), static_cast<int>(p.kind), p.width, p.height, p.orientation);
      },
      py::arg("data"), py::arg("max_pixels"), "(fault, kind, width, height, orientation) of one picture in memory.");
  module.def(
      "content_hash",
      [](const py::bytes& data, uint32_t seed) {
        const std::string_view bytes = data;
        const Hash128 hash = murmur3(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size(), seed);
        return py::make_tuple(hash.low, hash.high);
      },
      py::arg("data"), py::arg("seed") = 0, "MurmurHash3 x64 128 as two 64-bit numbers.");
}
