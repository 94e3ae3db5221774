-- What the reconciler reads: open orders by id, in steps.

-- The runner applies each file in a transaction, and one pass over orders is short.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX orders_open_id_idx ON orders (id) WHERE finished_at IS NULL;
