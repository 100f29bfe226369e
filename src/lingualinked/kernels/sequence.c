// Several kernels, called one after the other.
//
// It stands alone, and knows no kernel: each has one argument, the address of its structure.

struct call {
    int (*compute)(void *);
    void *arguments;
    long returns;  // whether what it returns says that it vouches for its results
};

struct sequence {
    const struct call *calls;
    long count;
};

// Call kernels; return whether all have vouched for their results. The first that does not is the last.
int call_all(const struct sequence *s) {
    for (long i = 0; i < s->count; i++) {
        const struct call *call = s->calls + i;
        const int is_known = call->compute(call->arguments);
        if (call->returns && !is_known) return 0;
    }
    return 1;
}
