// hostile.h: what the parts of drive_cpu.cpp share: rules, exact buffers, random and hostile numbers.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <random>

inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
inline constexpr double kInf = std::numeric_limits<double>::infinity();
inline unsigned seed;
inline int n_passed = 0, n_failed = 0;

inline void expect(bool condition, const char* what) {
    ++(condition ? n_passed : n_failed);
    if (!condition && n_failed < 20) std::printf("seed %u: BROKEN: %s\n", seed, what);
}

// A heap block of exactly n elements: one past the end is an error that AddressSanitizer sees.
template <typename T>
class Block {
   public:
    explicit Block(int64_t n) : n_(n), data_(new T[n]()) {}
    T* get() const { return data_.get(); }
    T& operator[](int64_t i) const { return data_[i]; }
    int64_t size() const { return n_; }
    bool operator==(const Block& other) const {
        return n_ == other.n_ && (n_ == 0 || std::memcmp(get(), other.get(), n_ * sizeof(T)) == 0);
    }

   private:
    int64_t n_;
    std::unique_ptr<T[]> data_;
};

class Random {
   public:
    explicit Random(unsigned s) : engine_(s) {}
    int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
    double real(double low, double high) { return std::uniform_real_distribution<double>(low, high)(engine_); }
    bool one_in(int n) { return integer(1, n) == 1; }
    double hostile() {
        static const double values[] = {kNaN, kInf, -kInf, 0.0, -0.0, -1.0, 1e300, -1e300, 1e-310, 0.5, 1e9};
        return values[integer(0, static_cast<int64_t>(std::size(values)) - 1)];
    }
    // Mostly harmless.
    double number(double low, double high) { return one_in(60) ? hostile() : real(low, high); }

   private:
    std::mt19937_64 engine_;
};

// One part a file of that name.
void drive_columns(Random& random);
void drive_retrieval(Random& random);
void drive_scans(Random& random);
