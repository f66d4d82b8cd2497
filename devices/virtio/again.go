package virtio

// Budget is how many chains a device takes from one queue before it returns to
// its [Worker], when answering one is quick. Between two calls the worker obeys
// Pause and Stop: a driver that adds chains as fast as the device answers them
// must not keep the machine from being paused.
const Budget = 512

// Again makes the worker call the queue's ready function once more after it
// returned, as if the driver had kicked: the device spent its [Budget] and
// chains may be waiting.
func (q *Queue) Again() { signal(q.hooks.KickFD) }
