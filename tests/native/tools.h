// What random problems are made of and compared with. Every array is its own allocation of the exact size.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
inline std::mt19937_64 engine;

inline int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine); }
inline bool chance(double p) { return std::uniform_real_distribution<double>(0, 1)(engine) < p; }
inline double normal() { return std::normal_distribution<double>()(engine); }

// An array with no slack behind it.
template <class T>
struct Array {
    std::unique_ptr<T[]> data;
    int64_t size = 0;
    explicit Array(int64_t n = 0, T value = T()) : data(new T[n]), size(n) { fill(value); }
    explicit Array(const std::vector<T>& from) : data(new T[from.size()]), size((int64_t)from.size()) {
        for (int64_t i = 0; i < size; ++i) data[i] = from[i];
    }
    void fill(T value) {
        for (int64_t i = 0; i < size; ++i) data[i] = value;
    }
    T& operator[](int64_t i) { return data[i]; }
    const T& operator[](int64_t i) const { return data[i]; }
};

struct Failure {
    std::string what;
};

inline void close(const char* what, double got, double want, double tolerance) {
    if (std::isinf(want) ? got == want : std::fabs(got - want) <= tolerance * (1 + std::fabs(want))) return;
    char text[160];
    std::snprintf(text, sizeof text, "%s is %.9g, expected %.9g", what, got, want);
    throw Failure{text};
}

// A random scan against plain loops; throws a Failure.
void run_scan_case(uint64_t seed, int64_t largest);
