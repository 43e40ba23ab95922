#!/bin/sh
# The network of kind's default plugin, without its policy engine: network.sh [CLUSTER]
#
# For a cluster of cluster.yaml. On each node: addresses by host-local, pods behind host routes by ptp, host ports by portmap
# (kind's node image has these), a route to each other node's pods, and masquerading of what leaves the cluster. Can be run
# again, and has to be after a node is added, or started anew.
set -eu
cluster=${1:-kind}
provider=${KIND_EXPERIMENTAL_PROVIDER:-docker}

on() { "$provider" exec -i "$1" sh -euc "$2"; }
of_family() { case $1 in *:*) [ "$2" = 6 ] ;; *) [ "$2" = 4 ] ;; esac; }

# NODE|POD RANGES|ADDRESSES, a line for each
nodes=$(kubectl --context "kind-$cluster" get nodes -o jsonpath='{range .items[*]}{.metadata.name}|{.spec.podCIDRs[*]}|{.status.addresses[?(@.type=="InternalIP")].address}{"\n"}{end}')

conflist() {
  routes='' ranges=''
  for range in $1; do
    if of_family "$range" 6; then everywhere=::/0; else everywhere=0.0.0.0/0; fi
    routes="$routes${routes:+, }{\"dst\": \"$everywhere\"}"
    ranges="$ranges${ranges:+, }[{\"subnet\": \"$range\"}]"
  done
  cat <<EOF
{"cniVersion": "0.3.1", "name": "pods", "plugins": [
  {"type": "ptp", "ipMasq": false, "ipam": {"type": "host-local", "dataDir": "/run/cni-ipam-state",
   "routes": [$routes], "ranges": [$ranges]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}
]}
EOF
}

# What leaves the cluster gets the node's address; what goes to a pod of the cluster keeps its own.
masquerade() {
  rules=''
  for family in 4 6; do
    [ $family = 4 ] && tables=iptables || tables=ip6tables
    here=''
    for range in $1; do of_family "$range" $family && here=$range || :; done
    [ -n "$here" ] || continue
    rules="$rules
      $tables -t nat -N PODS-OUT 2>/dev/null || $tables -t nat -F PODS-OUT"
    for range in $2; do
      ! of_family "$range" $family || rules="$rules
      $tables -t nat -A PODS-OUT -d $range -j RETURN"
    done
    rules="$rules
      $tables -t nat -A PODS-OUT -j MASQUERADE
      $tables -t nat -C POSTROUTING -s $here -j PODS-OUT 2>/dev/null || $tables -t nat -A POSTROUTING -s $here -j PODS-OUT"
  done
  echo "$rules"
}

everyones=$(echo "$nodes" | cut -d'|' -f2 | tr '\n' ' ')
echo "$nodes" | while IFS='|' read -r node ranges _; do
  [ -n "$ranges" ] || { echo "$node has no range for pods yet: wait a moment, and try again" >&2; exit 1; }
  routes=$(echo "$nodes" | while IFS='|' read -r other theirs addresses; do
    [ "$other" != "$node" ] || continue
    for range in $theirs; do
      for address in $addresses; do
        for family in 4 6; do
          if of_family "$range" $family && of_family "$address" $family; then
            echo "ip -$family route replace $range via $address"
          fi
        done
      done
    done
  done)
  on "$node" "$routes
$(masquerade "$ranges" "$everyones")" </dev/null
  conflist "$ranges" | on "$node" 'cat >/etc/cni/net.d/.pods && mv /etc/cni/net.d/.pods /etc/cni/net.d/10-pods.conflist'
  echo "$node: pods get addresses of $ranges"
done
