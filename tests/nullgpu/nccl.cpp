// NCCL between processes of one machine, on the queues of device.hpp: orders that hang a GPU hang here, and are reported.
//
//   collective    every member publishes kind, count, type and address; all compare, read each other's memory, and leave
//                 together; different kinds, counts or types end the processes (exit code 87)
//   send, recv    of a group run together; up to 64 KiB a send does not wait for its receiver, as NCCL's buffers allow
#include <fcntl.h>
#include <sys/uio.h>

#include <vector>

#include "device.hpp"

using namespace nullgpu;
using Error = int;

namespace {

constexpr int MOST_RANKS = 8, RING = 16;
constexpr size_t BUFFERED = 65536;
enum Kind { ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST, REDUCE, SEND, RECEIVE };
const char* NAMES[] = {"all reduce", "all gather", "reduce scatter", "broadcast", "reduce", "send", "receive"};
enum Operator { SUM, PRODUCT, MAX, MIN, AVERAGE };
const size_t ITEM_BYTES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};  // ncclDataType_t

struct Slot {  // what a member does in a collective
    pid_t pid;
    const void* source;
    size_t count;
    int type, kind, op;
    std::atomic<long> posted, done;
};
struct Message {
    pid_t pid;
    const void* source;  // null: the bytes are in `buffer`
    size_t bytes;
    char buffer[BUFFERED];
};
struct Channel {  // from one member to another
    std::atomic<long> sent, received;
    Message ring[RING];
};
struct Shared {
    std::atomic<int> joined;
    Slot slots[MOST_RANKS];
    Channel channels[MOST_RANKS][MOST_RANKS];
};
struct Communicator {
    int rank, size, number;
    Shared* shared;
    long collectives = 0, sends[MOST_RANKS] = {}, receives[MOST_RANKS] = {};
};
struct Call {
    Kind kind;
    const void* source;
    void* target;
    size_t count;
    int type, op, peer;
    Communicator* comm;
    void* stream;

    size_t bytes() const { return count * ITEM_BYTES[type]; }
    std::string text() const {
        std::string where = " of " + std::to_string(count) + " items, type " + std::to_string(type) +
                            ", communicator " + std::to_string(comm->number) + " of " + std::to_string(comm->size);
        return NAMES[kind] + where + (kind >= BROADCAST ? ", peer " + std::to_string(peer) : "");
    }
};

void read_from(pid_t pid, void* target, const void* source, size_t bytes) {
    if (pid == getpid()) {
        memmove(target, source, bytes);
        return;
    }
    for (size_t done = 0; done < bytes;) {
        iovec here{static_cast<char*>(target) + done, bytes - done};
        iovec there{static_cast<char*>(const_cast<void*>(source)) + done, bytes - done};
        ssize_t moved = process_vm_readv(pid, &here, 1, &there, 1, 0);
        if (moved <= 0) {
            perror("[nullgpu] process_vm_readv");
            _exit(MISMATCH);
        }
        done += moved;
    }
}

template <class T>
void combine(T* sum, const T* other, size_t count, int op) {
    for (size_t i = 0; i < count; i++)
        sum[i] = op == MAX ? std::max(sum[i], other[i]) : op == MIN ? std::min(sum[i], other[i])
                 : op == PRODUCT ? T(sum[i] * other[i]) : T(sum[i] + other[i]);
}

float to_float(uint16_t half) {
    uint32_t bits = uint32_t(half) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits >> 16;
}

void combine_any(char* sum, const char* other, size_t count, int type, int op) {
    switch (type) {
        case 0: return combine((int8_t*)sum, (const int8_t*)other, count, op);
        case 1: return combine((uint8_t*)sum, (const uint8_t*)other, count, op);
        case 2: return combine((int32_t*)sum, (const int32_t*)other, count, op);
        case 4: return combine((int64_t*)sum, (const int64_t*)other, count, op);
        case 7: return combine((float*)sum, (const float*)other, count, op);
        case 8: return combine((double*)sum, (const double*)other, count, op);
        case 9: {
            std::vector<float> left(count), right(count);
            for (size_t i = 0; i < count; i++) {
                left[i] = to_float(((uint16_t*)sum)[i]);
                right[i] = to_float(((const uint16_t*)other)[i]);
            }
            combine(left.data(), right.data(), count, op);
            for (size_t i = 0; i < count; i++) ((uint16_t*)sum)[i] = to_bfloat16(left[i]);
            return;
        }
        default:
            fprintf(stderr, "[nullgpu] type %d cannot be reduced here\n", type);
            _exit(MISMATCH);
    }
}

// This member's result, read from the others' memory.
std::vector<char> result_of(const Call& call) {
    Communicator& comm = *call.comm;
    size_t bytes = call.bytes(), offset = call.kind == REDUCE_SCATTER ? comm.rank * bytes : 0;
    auto read = [&](int member, char* target) {
        Slot& slot = comm.shared->slots[member];
        read_from(slot.pid, target, static_cast<const char*>(slot.source) + offset, bytes);
    };
    if (call.kind == ALL_GATHER) {
        std::vector<char> all(bytes * comm.size);
        for (int member = 0; member < comm.size; member++) read(member, all.data() + member * bytes);
        return all;
    }
    std::vector<char> found(bytes), other(bytes);
    if (call.kind == BROADCAST) {
        read(call.peer, found.data());
        return found;
    }
    read(0, found.data());
    for (int member = 1; member < comm.size; member++) {
        read(member, other.data());
        combine_any(found.data(), other.data(), call.count, call.type, call.op);
    }
    return found;
}

void run_collective(const Call& call) {
    Communicator& comm = *call.comm;
    long number = ++comm.collectives;
    Slot& own = comm.shared->slots[comm.rank];
    own.pid = getpid();
    own.source = call.source;
    own.count = call.count;
    own.type = call.type;
    own.kind = call.kind;
    own.op = call.op;
    own.posted.store(number);
    std::string what = call.text() + ", its collective " + std::to_string(number);
    for (int member = 0; member < comm.size; member++) {
        Slot& slot = comm.shared->slots[member];
        wait_for([&] { return slot.posted.load() >= number; }, what + " waits for member " + std::to_string(member));
        if (slot.kind != call.kind || slot.count != call.count || slot.type != call.type) {
            fprintf(stderr, "[nullgpu rank %s] MISMATCH: %s, but member %d calls %s of %zu items, type %d\n", rank(),
                    what.c_str(), member, NAMES[slot.kind], slot.count, slot.type);
            fflush(stderr);
            _exit(MISMATCH);
        }
    }
    std::vector<char> found = result_of(call);
    own.done.store(number);
    for (int member = 0; member < comm.size; member++)
        wait_for([&] { return comm.shared->slots[member].done.load() >= number; }, what + " ends");
    if (call.target && (call.kind != REDUCE || comm.rank == call.peer))
        memcpy(call.target, found.data(), found.size());
}

void post_send(const Call& call, std::vector<std::pair<Channel*, long>>& unbuffered) {
    Communicator& comm = *call.comm;
    Channel& channel = comm.shared->channels[comm.rank][call.peer];
    long number = comm.sends[call.peer]++;
    wait_for([&] { return number - channel.received.load() < RING; }, call.text() + ": too many sends are open");
    Message& message = channel.ring[number % RING];
    message.pid = getpid();
    message.bytes = call.bytes();
    message.source = message.bytes > BUFFERED ? call.source : nullptr;
    if (message.source)
        unbuffered.push_back({&channel, number});
    else
        memcpy(message.buffer, call.source, message.bytes);
    channel.sent.store(number + 1);
}

void receive(const Call& call) {
    Communicator& comm = *call.comm;
    Channel& channel = comm.shared->channels[call.peer][comm.rank];
    long number = comm.receives[call.peer]++;
    wait_for([&] { return channel.sent.load() > number; }, call.text());
    Message& message = channel.ring[number % RING];
    if (message.bytes != call.bytes()) {
        fprintf(stderr, "[nullgpu rank %s] MISMATCH: %s, but %zu bytes were sent\n", rank(), call.text().c_str(),
                message.bytes);
        fflush(stderr);
        _exit(MISMATCH);
    }
    if (message.source)
        read_from(message.pid, call.target, message.source, message.bytes);
    else
        memcpy(call.target, message.buffer, message.bytes);
    channel.received.store(number + 1);
}

void run_together(const std::vector<Call>& calls) {  // of one group, on one stream
    std::vector<std::pair<Channel*, long>> unbuffered;
    for (auto& call : calls)
        if (call.kind == SEND) post_send(call, unbuffered);
    for (auto& call : calls)
        if (call.kind == RECEIVE) receive(call);
    for (auto& each : unbuffered)
        wait_for([&] { return each.first->received.load() > each.second; }, "a send waits for its receiver");
    for (auto& call : calls)
        if (call.kind < SEND) run_collective(call);
}

thread_local int depth = 0;
thread_local std::vector<Call> open_calls;

void flush() {
    std::vector<void*> order;
    std::map<void*, std::vector<Call>> by_stream;
    for (auto& call : open_calls) {
        if (!by_stream.count(call.stream)) order.push_back(call.stream);
        by_stream[call.stream].push_back(call);
    }
    open_calls.clear();
    for (void* stream : order) {
        std::vector<Call> calls = by_stream[stream];
        put(stream, [calls] { run_together(calls); }, calls[0].text());
    }
}

Error add(Call call) {
    open_calls.push_back(call);
    if (!depth) flush();
    return 0;
}

struct Id {
    char bytes[128];
};

}  // namespace

extern "C" {
using Comm = Communicator*;

Error ncclGetVersion(int* version) { *version = 22809; return 0; }
const char* ncclGetErrorString(Error) { return "nullgpu"; }
const char* ncclGetLastError(void*) { return ""; }
Error ncclGetUniqueId(Id* id) {
    memset(id, 0, sizeof *id);
    FILE* random = fopen("/dev/urandom", "rb");
    if (!random || fread(id->bytes, 1, 16, random) != 16) abort();
    fclose(random);
    return 0;
}
Error ncclCommInitRankConfig(Comm* comm, int size, Id id, int rank_in_it, void*) {
    static std::atomic<int> number{0};
    if (size > MOST_RANKS) abort();
    char name[64] = "/nullgpu_";
    for (int i = 0; i < 16; i++) snprintf(name + 9 + 2 * i, 3, "%02x", (unsigned char)id.bytes[i]);
    int file = shm_open(name, O_CREAT | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, sizeof(Shared))) abort();
    void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    device_memory();  // lets the other members read this process
    Comm made = new Communicator{rank_in_it, size, number++, static_cast<Shared*>(memory)};
    made->shared->joined++;
    wait_for([&] { return made->shared->joined.load() >= size; }, "a communicator of " + std::to_string(size));
    shm_unlink(name);
    *comm = made;
    return 0;
}
Error ncclCommInitRank(Comm* comm, int size, Id id, int rank_in_it) {
    return ncclCommInitRankConfig(comm, size, id, rank_in_it, nullptr);
}
Error ncclCommCount(Comm comm, int* size) { *size = comm->size; return 0; }
Error ncclCommUserRank(Comm comm, int* found) { *found = comm->rank; return 0; }
Error ncclCommGetAsyncError(void*, Error* error) { *error = 0; return 0; }
Error ncclCommAbort(void*) { return 0; }
Error ncclCommDestroy(void*) { return 0; }
Error ncclCommFinalize(void*) { return 0; }
Error ncclCommRegister(...) { return 0; }
Error ncclCommDeregister(...) { return 0; }
Error ncclGroupStart() { depth++; return 0; }
Error ncclGroupEnd() {
    if (--depth == 0) flush();
    return 0;
}
Error ncclAllReduce(const void* source, void* target, size_t count, int type, int op, Comm comm, void* stream) {
    return add({ALL_REDUCE, source, target, count, type, op, 0, comm, stream});
}
Error ncclAllGather(const void* source, void* target, size_t count, int type, Comm comm, void* stream) {
    return add({ALL_GATHER, source, target, count, type, 0, 0, comm, stream});
}
Error ncclReduceScatter(const void* source, void* target, size_t count, int type, int op, Comm comm, void* stream) {
    return add({REDUCE_SCATTER, source, target, count, type, op, 0, comm, stream});
}
Error ncclReduce(const void* source, void* target, size_t count, int type, int op, int root, Comm comm, void* stream) {
    return add({REDUCE, source, target, count, type, op, root, comm, stream});
}
Error ncclBroadcast(const void* source, void* target, size_t count, int type, int root, Comm comm, void* stream) {
    return add({BROADCAST, source, target, count, type, 0, root, comm, stream});
}
Error ncclBcast(void* data, size_t count, int type, int root, Comm comm, void* stream) {
    return ncclBroadcast(data, data, count, type, root, comm, stream);
}
Error ncclSend(const void* source, size_t count, int type, int peer, Comm comm, void* stream) {
    return add({SEND, source, nullptr, count, type, 0, peer, comm, stream});
}
Error ncclRecv(void* target, size_t count, int type, int peer, Comm comm, void* stream) {
    return add({RECEIVE, nullptr, target, count, type, 0, peer, comm, stream});
}
Error ncclAlltoAll(const void* source, void* target, size_t count, int type, Comm comm, void* stream) {
    size_t bytes = count * ITEM_BYTES[type];
    ncclGroupStart();
    for (int member = 0; member < comm->size; member++) {
        ncclSend(static_cast<const char*>(source) + member * bytes, count, type, member, comm, stream);
        ncclRecv(static_cast<char*>(target) + member * bytes, count, type, member, comm, stream);
    }
    return ncclGroupEnd();
}
}
