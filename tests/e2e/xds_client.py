"""A delta xDS client made of what others publish: gRPC's library and Envoy's descriptors.

It subscribes to istio.workload.Address and writes one JSON line per response, with what it could read of each resource.
Resources are read by the numbers of their fields on the wire, without any description of ours. What it holds is kept in
a file, name to version: started again with it, the client resumes. The end of the stream is a line, too.
"""

import argparse
import json
import os
import queue
import sys

import grpc
from envoy.config.core.v3 import base_pb2
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2
from google.rpc import status_pb2

ADDRESS = "type.googleapis.com/istio.workload.Address"


def fields(data):
    """Number and value of each field of a message: an integer, or bytes."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, varint()
        elif kind == 2:
            length = varint()
            if at + length > len(data):
                raise ValueError("a field is longer than its message")
            yield number, data[at : at + length]
            at += length
        else:
            raise ValueError(f"field {number} has wire type {kind}")


def read(data):
    """What a test looks at of an Address: 1 is a workload, 2 a service."""
    ((kind, body),) = list(fields(data))
    got = {}
    for number, value in fields(body):
        got.setdefault(number, []).append(value)

    def text(number):
        return got.get(number, [b""])[-1].decode()

    def number(field):
        return got.get(field, [0])[-1]

    if kind == 1:
        return {
            "workload": text(1),
            "namespace": text(2),
            "addresses": [address.hex() for address in got.get(3, [])],
            "tunnel": number(5),
            "service_account": text(7),
            "node": text(9),
            "uid": text(20),
            "services": sorted(dict(fields(entry))[1].decode() for entry in got.get(22, [])),
        }
    if kind == 2:
        return {
            "service": text(1),
            "namespace": text(2),
            "hostname": text(3),
            "addresses": [dict(fields(address))[2].hex() for address in got.get(4, [])],
            "ports": [[dict(fields(port)).get(field, 0) for field in (1, 2)] for port in got.get(5, [])],
        }
    raise ValueError(f"an Address with field {kind}")


def tell(**line):
    print(json.dumps(line), flush=True)


def converse(stub, options, held):
    requests = queue.Queue()
    node = base_pb2.Node(id="sidecar~192.0.2.1~client.test~test.svc.cluster.local")
    requests.put(
        discovery_pb2.DeltaDiscoveryRequest(node=node, type_url=ADDRESS, initial_resource_versions=held)
    )
    metadata = [("authorization", "Bearer " + options.token)] if options.token else []
    for response in stub.DeltaAggregatedResources(iter(requests.get, None), metadata=metadata):
        refused = [one.name for one in response.resources if one.name == options.refuse]
        # Once: what comes later is taken.
        options.refuse = None if refused else options.refuse
        answer = discovery_pb2.DeltaDiscoveryRequest(type_url=ADDRESS, response_nonce=response.nonce)
        if refused:
            answer.error_detail.CopyFrom(status_pb2.Status(code=3, message="not this one"))
        resources = {}
        for one in response.resources:
            if one.resource.type_url != ADDRESS:
                raise ValueError(f"{one.name} is a {one.resource.type_url}")
            if one.name not in refused:
                resources[one.name] = read(one.resource.value)
                held[one.name] = one.version
        for name in response.removed_resources:
            held.pop(name, None)
        with open(options.state + ".new", "w", encoding="utf-8") as file:
            json.dump(held, file)
        os.rename(options.state + ".new", options.state)
        tell(type=response.type_url, resources=resources, removed=list(response.removed_resources), refused=refused)
        requests.put(answer)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", required=True, help="address and port")
    parser.add_argument("--name", required=True, help="what the server's certificate has to say")
    parser.add_argument("--root", required=True, help="file with the root certificates")
    parser.add_argument("--token", default="", help="of a service account")
    parser.add_argument("--state", required=True, help="file in which is kept what the client holds")
    parser.add_argument("--refuse", help="a resource to refuse when it comes first")
    options = parser.parse_args()
    held = {}
    if os.path.exists(options.state):
        with open(options.state, encoding="utf-8") as file:
            held = json.load(file)
    with open(options.root, "rb") as file:
        credentials = grpc.ssl_channel_credentials(file.read())
    settings = [("grpc.ssl_target_name_override", options.name)]
    with grpc.secure_channel(options.server, credentials, settings) as channel:
        try:
            converse(ads_pb2_grpc.AggregatedDiscoveryServiceStub(channel), options, held)
            tell(ended="OK")
        except grpc.RpcError as error:
            tell(ended=error.code().name, reason=error.details())


sys.exit(main())
