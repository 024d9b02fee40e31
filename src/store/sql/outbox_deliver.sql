-- Stores messages for later; a repeat with the same token returns the ids of the first call. Primary keys.
-- $1 token  $2 topic  $3 when  $4 or after how many seconds  $5 payloads  $6 keys  $7 headers
select shardmq.deliver_all($1, $2, $3, $4, $5::bytea[], $6::text[], $7::jsonb[])
