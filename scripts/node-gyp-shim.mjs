#!/usr/bin/env node
// prebuildify builds by calling "node-gyp"; this stands in its place (prebuildify --node-gyp) and lets cmake-js build.
import { spawnSync } from 'node:child_process';

const { status } = spawnSync('npx', ['--no-install', 'cmake-js', 'compile'], { stdio: 'inherit' });
process.exit(status ?? 1);
