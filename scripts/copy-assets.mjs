// Copies what tsc leaves behind (CSS and browser scripts of the report) to dist/, and makes the command executable.
import { chmod, cp } from 'node:fs/promises';

const at = (path) => new URL(`../${path}`, import.meta.url);

await cp(at('lib/assets'), at('dist/assets'), { recursive: true });
await chmod(at('dist/cli.js'), 0o755);
