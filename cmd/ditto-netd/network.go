package main

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/containers/gvisor-tap-vsock/pkg/types"
	"github.com/containers/gvisor-tap-vsock/pkg/virtualnetwork"

	"ditto.vm/internal/netd"
)

// gatewayMAC is the router's address on the guest's network: locally
// administered, the same for every VM, as the networks are never joined.
const gatewayMAC = "5a:94:ef:e4:0c:dd"

// zone is the domain of the names that the DNS server answers itself.
const zone = "ditto.internal."

// newNetwork builds the guest's network: gateway, DHCP, DNS, NAT and the UDP
// forwards. The error is a [*netd.StartError].
func newNetwork(config netd.Config, addresses netd.Addresses) (*virtualnetwork.VirtualNetwork, error) {
	network, err := virtualnetwork.New(stackConfig(config, addresses))
	if err == nil {
		return network, nil
	}
	if err := udpError(config.Forwards, err); err != nil {
		return nil, err
	}
	return nil, &netd.StartError{Code: netd.ExitFailure, Text: fmt.Sprintf("set the network up: %v", err)}
}

// stackConfig says config in the terms of the network stack.
func stackConfig(config netd.Config, addresses netd.Addresses) *types.Configuration {
	leases := make(map[string]string)
	if config.MAC != nil {
		leases[addresses.Guest.String()] = config.MAC.String()
	}
	// Nobody but the host may have its address.
	leases[addresses.Host.String()] = gatewayMAC
	return &types.Configuration{
		MTU:               config.MTU,
		Subnet:            config.Subnet.String(),
		GatewayIP:         addresses.Gateway.String(),
		GatewayMacAddress: gatewayMAC,
		GatewayVirtualIPs: []string{addresses.Host.String()},
		NAT:               map[string]string{addresses.Host.String(): "127.0.0.1"},
		DHCPStaticLeases:  leases,
		Forwards:          udpForwards(config.Forwards, addresses.Guest),
		Protocol:          types.QemuProtocol,
		DNS: []types.Zone{{
			Name: zone,
			Records: []types.Record{
				{Name: "host", IP: ip(addresses.Host)},
				{Name: "gateway", IP: ip(addresses.Gateway)},
			},
		}},
	}
}

func ip(a netip.Addr) net.IP { return net.IP(a.AsSlice()) }
