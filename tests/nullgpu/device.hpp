// Queues of a GPU that computes nothing: memory of the host as memory of the device, and a thread for each stream.
//
//   put(stream, work)    queued; work of one stream runs in order, streams run beside each other and beside the host
//   drain(stream)        what a synchronisation waits for
//
// Kernels are not queued: they would do nothing. Copies, events, callbacks and NCCL are.
#pragma once
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>

namespace nullgpu {

using Work = std::function<void()>;

inline std::mutex mutex;  // of all state: small and sure
inline std::condition_variable changed;

inline const char* rank() {
    const char* value = getenv("RANK");
    return value ? value : "0";
}

inline double patience() {  // seconds after which waiting counts as a hang
    const char* value = getenv("NULLGPU_PATIENCE");
    return value ? atof(value) : 20.0;
}

constexpr int HANG = 86, MISMATCH = 87;  // exit codes

struct Stream {
    std::deque<std::pair<Work, std::string>> queue;
    bool busy = false;
    std::string what;

    void run() {
        for (;;) {
            Work work;
            {
                std::unique_lock<std::mutex> lock(mutex);
                changed.wait(lock, [&] { return !queue.empty(); });
                work = queue.front().first;
                what = queue.front().second;
                queue.pop_front();
                busy = true;
            }
            work();
            {
                std::lock_guard<std::mutex> lock(mutex);
                busy = false;
            }
            changed.notify_all();
        }
    }
    bool idle() const { return queue.empty() && !busy; }
};

inline std::map<void*, Stream*> streams;

inline Stream* stream_of(void* handle) {  // the mutex is held
    Stream*& stream = streams[handle];
    if (!stream) {
        stream = new Stream;
        std::thread(&Stream::run, stream).detach();
    }
    return stream;
}

inline void put(void* handle, Work work, const std::string& what) {
    {
        std::lock_guard<std::mutex> lock(mutex);
        stream_of(handle)->queue.push_back({std::move(work), what});
    }
    changed.notify_all();
}

inline void drain(void* handle) {
    std::unique_lock<std::mutex> lock(mutex);
    Stream* stream = stream_of(handle);
    changed.wait(lock, [&] { return stream->idle(); });
}

inline void drain_all() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [] {
        for (auto& each : streams)
            if (!each.second->idle()) return false;
        return true;
    });
}

// Waits for a condition of another process; past the patience every busy stream is named and the process ends.
inline void wait_for(const std::function<bool()>& is_met, const std::string& what) {
    const double pause = 50e-6;
    for (double waited = 0; !is_met(); waited += pause) {
        if (waited > patience()) {
            fprintf(stderr, "[nullgpu rank %s] HANG: %s\n", rank(), what.c_str());
            for (auto& each : streams)
                if (each.second->busy)
                    fprintf(stderr, "[nullgpu rank %s] stream %p runs: %s; %zu more are queued\n", rank(), each.first,
                            each.second->what.c_str(), each.second->queue.size());
            fflush(stderr);
            _exit(HANG);
        }
        usleep(useconds_t(pause * 1e6));
    }
}

// Addresses of device memory lie in one range, so that a pointer says where it points.
class Arena {
    static constexpr size_t SIZE = size_t(1) << 40, ALIGNMENT = 512;
    char* base;
    std::atomic<size_t> used{0};

   public:
    Arena() {
        prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);  // other ranks read this one's memory
        base = static_cast<char*>(mmap(nullptr, SIZE, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (base == MAP_FAILED) abort();
    }
    void* take(size_t bytes) { return base + used.fetch_add((bytes + 2 * ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT); }
    bool owns(const void* pointer) const { return pointer >= base && pointer < base + SIZE; }
};

inline Arena& device_memory() {
    static Arena arena;
    return arena;
}
inline Arena& pinned_memory() {
    static Arena arena;
    return arena;
}

}  // namespace nullgpu
