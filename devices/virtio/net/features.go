package net

// Feature bits (virtio 1.2 5.1.3).
const (
	featureCsum          uint64 = 1 << 0
	featureGuestCsum     uint64 = 1 << 1
	featureCtrlOffloads  uint64 = 1 << 2
	featureMTU           uint64 = 1 << 3
	featureMAC           uint64 = 1 << 5
	featureGuestTSO4     uint64 = 1 << 7
	featureGuestTSO6     uint64 = 1 << 8
	featureGuestECN      uint64 = 1 << 9
	featureHostTSO4      uint64 = 1 << 11
	featureHostTSO6      uint64 = 1 << 12
	featureHostECN       uint64 = 1 << 13
	featureMergeBuffers  uint64 = 1 << 15
	featureStatus        uint64 = 1 << 16
	featureCtrlQueue     uint64 = 1 << 17
	featureCtrlRX        uint64 = 1 << 18
	featureCtrlVLAN      uint64 = 1 << 19
	featureCtrlRXExtra   uint64 = 1 << 20
	featureGuestAnnounce uint64 = 1 << 21
	featureCtrlMAC       uint64 = 1 << 23
	featureGuestUSO4     uint64 = 1 << 54
	featureGuestUSO6     uint64 = 1 << 55
	featureHostUSO       uint64 = 1 << 56
)

// ownFeatures need no backend.
const ownFeatures = featureMAC | featureStatus | featureMergeBuffers | featureCtrlQueue |
	featureCtrlRX | featureCtrlRXExtra | featureCtrlVLAN | featureCtrlMAC | featureGuestAnnounce

// guestSegments are frames longer than the MTU that a guest takes.
const guestSegments = featureGuestTSO4 | featureGuestTSO6 | featureGuestUSO4 | featureGuestUSO6

// guestOffloads are the bits that the driver may switch while it runs (virtio
// 1.2 5.1.6.5.6).
const guestOffloads = featureGuestCsum | featureGuestECN | guestSegments

// offloads are the bits that only a backend can offer.
const offloads = guestOffloads | featureCsum | featureHostTSO4 | featureHostTSO6 | featureHostECN | featureHostUSO
