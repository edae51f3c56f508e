#!/bin/sh
# Tells this node every few seconds who has which address in the cluster, and which NetworkPolicies there are.
# Needs kubectl with the rights of feeder-rbac.yaml, and root for joey. What did not change is not applied again.
set -eu
node_policy=${1:?usage: feed.sh NODE-POLICY.yaml [SECONDS]}
every=${2:-5}
state=$(mktemp -d)
trap 'rm -rf "$state"' EXIT

# changed NAME: whether $state/NAME.new is another than what was applied last.
changed() {
    ! cmp -s "$state/$1.new" "$state/$1"
}

while :; do
    # Who has which address.
    if kubectl get pods,services,namespaces -A -o json >"$state/identities.new" &&
        changed identities && joey identity apply -f "$state/identities.new"; then
        mv "$state/identities.new" "$state/identities"
    fi
    if kubectl get networkpolicies -A -o yaml >"$state/policies.new" && changed policies &&
        joey policy apply --isolate-refused -f "$node_policy" -f "$state/policies.new"; then
        mv "$state/policies.new" "$state/policies"
    fi
    sleep "$every"
done
