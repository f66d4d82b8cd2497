// Package net is the virtio network device (virtio 1.2 5.1) with one pair of
// queues and a control queue, over a [Backend]: a tap, or a stream socket to a
// user-mode network such as ditto-netd or passt.
//
//	guest --transmitq--> transmitter --Send-----> Backend (tap, socket)
//	guest <--receiveq--- receiver <----Receive---    |
//	guest --controlq---> receiver (filters, offloads, announcements)
//
// With a tap, frames and their offload headers go between guest memory and the
// kernel without a copy: one readv or writev a frame. What the tap cannot know
// beforehand, how long the next frame is, is solved by holding enough of the
// guest's buffers for the longest one.
//
// Ownership: the transmitter and the receiver are a [virtio.Worker] each. The
// receiver owns the receive and control queues, the filter and the receiving
// half of the backend, the transmitter the transmit queue and the other half.
// The caller of [New] owns the backend and closes it after the device was
// stopped.
//
// A device resumes with what it had; frames that are in the backend's or the
// kernel's buffers at a pause may be lost, as on any network.
package net
