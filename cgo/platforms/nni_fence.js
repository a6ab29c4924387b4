'use strict';
// Loaded into NNI's manager before it starts (node's own option --require, see cgo.platforms.nni).
//
// By itself the manager listens on every interface, asks nobody for a password, and lets a second
// connection to its tuner channel take the place of the first. Whoever holds that channel says what
// trials are given.
const http = require('http');
const net = require('net');

const fence = JSON.parse(process.env.CGO_NNI_FENCE);
delete process.env.CGO_NNI_FENCE; // the manager's children are not fenced
if (fence.options === null) {
    delete process.env.NODE_OPTIONS;
} else {
    process.env.NODE_OPTIONS = fence.options;
}

// --- who may connect to the manager's port ---

const listen = net.Server.prototype.listen;
net.Server.prototype.listen = function (...given) {
    if (fence.local && given[0] === fence.port && typeof given[1] !== 'string') {
        given.splice(1, 0, '127.0.0.1');
    }
    return listen.apply(this, given);
};

function isLoopback(address) {
    return /^(::ffff:)?127\./.test(address) || address === '::1';
}

function isHere(host) { // a name by which this machine knows itself, with or without a port
    return /^(localhost|127\.0\.0\.1|\[::1\])(:\d+)?$/i.test(host);
}

// Pages of other sites, open in a browser on this machine, must not reach the manager through it.
function isOtherSite(headers) {
    const { host, origin } = headers;
    if (host !== undefined && !isHere(host)) {
        return true;
    }
    return origin !== undefined && !isHere(origin.replace(/^https?:\/\//i, ''));
}

function isAllowed(request, port) {
    if (!fence.private || port !== fence.port) {
        return true; // what workers on other machines talk to
    }
    if (!isLoopback(request.socket.remoteAddress ?? '')) {
        return request.url.startsWith('/platform/');
    }
    return !isOtherSite(request.headers);
}

// --- one tuner ---

let tuner = null;

function isSecondTuner(request, socket) {
    if (!/\/tuner\/?$/.test(request.url.split('?')[0])) {
        return false;
    }
    if (tuner !== null && !tuner.destroyed) {
        return true;
    }
    tuner = socket;
    return false;
}

const emit = http.Server.prototype.emit;
http.Server.prototype.emit = function (event, request, ...rest) {
    if (event === 'request' || event === 'upgrade') {
        const socket = request.socket;
        const allowed = isAllowed(request, socket.localPort);
        if (!allowed || (event === 'upgrade' && isSecondTuner(request, socket))) {
            socket.destroy();
            return true;
        }
    }
    return emit.call(this, event, request, ...rest);
};
