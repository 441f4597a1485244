// The interpreter's lock, let go while kernels work.
// defines: Released
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

namespace shallow {

// As py::gil_scoped_release, but in a daemon thread that outlives the interpreter. There Python ends
// the thread by unwinding it, and a destructor that is unwound ends the process by SIGABRT: such a
// thread waits for the end of the process instead, as Python 3.14 has it.
class Released {
public:
    Released() : state_(PyEval_SaveThread()) {}
    ~Released() { take(); }
    Released(const Released&) = delete;
    Released& operator=(const Released&) = delete;

    // Taken back for a while.
    class Held {
    public:
        explicit Held(Released& released) : released_(released) { released_.take(); }
        ~Held() { released_.state_ = PyEval_SaveThread(); }
        Held(const Held&) = delete;
        Held& operator=(const Held&) = delete;

    private:
        Released& released_;
    };

private:
    void take() {
        try {
            PyEval_RestoreThread(state_);
        } catch (...) {  // of C nothing else is thrown
            for (;;) pause();
        }
    }

    PyThreadState* state_;
};

}  // namespace shallow
